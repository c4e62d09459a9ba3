"""Base models by their id on the Hugging Face Hub, for those who ask for it: hf://org/name.

Nothing is downloaded for any other spelling. `huggingface_hub` keeps the files in its own cache and
obeys HF_HOME, HF_TOKEN and HF_HUB_OFFLINE; it is imported when a hub id is met.
"""

import re
from pathlib import Path
from typing import NamedTuple

from lorafusion_jax.errors import ModelError

HUB_PREFIX = "hf://"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9._/-]+))?")
# Never pickles, and no copies of the weights in other formats or under other names.
_WANTED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class HubId(NamedTuple):
    """A model on the hub.

    Attributes:
        repo: organisation and name.
        revision: branch, tag or commit; None for the main branch.
    """

    repo: str
    revision: str | None


def hub_id(model: str | Path) -> HubId | None:
    """Returns what hf://org/name or hf://org/name@revision means; None for a local path.

    Raises:
        ModelError: it starts like a hub id and is none.
    """
    text = str(model)
    if not text.startswith(HUB_PREFIX):
        return None
    found = _HUB_ID.fullmatch(text.removeprefix(HUB_PREFIX))
    if found is None:
        raise ModelError(
            f"{text}: expected hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@COMMIT"
        )
    return HubId(found["repo"], found["revision"])


def local_model(model: str | Path) -> Path:
    """Returns where a model lies on this machine; a hub id is downloaded, or found in the cache.

    Raises:
        ModelError: the hub has no such model, asks for a permission, or cannot be reached.
    """
    wanted = hub_id(model)
    if wanted is None:
        return Path(model)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=list(_WANTED))
        )
    except GatedRepoError:
        problem = "access has to be asked for on its page; then log in with `hf auth login`"
    except RepositoryNotFoundError:
        problem = "the hub has no such model, or it is private: check the name, or log in with "
        problem += "`hf auth login`"
    except RevisionNotFoundError:
        problem = f"the model has no revision {wanted.revision!r}"
    except LocalEntryNotFoundError as error:
        where = f"it is not in the cache {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            problem = f"{where}, and HF_HUB_OFFLINE forbids to download it: unset HF_HUB_OFFLINE, "
            problem += "or give a local directory"
        else:
            problem = f"{where}, and the hub cannot be reached ({error}): check the connection, or "
            problem += "give a local directory"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        problem = f"the download failed: {error}"
    raise ModelError(f"{model}: {problem}")
