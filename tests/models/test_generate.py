"""Generation: cached equals uncached, rows keep to themselves, stops, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import generate as module
from lorafusion_jax.errors import AdapterError, ModelError
from lorafusion_jax.generate import generate
from lorafusion_jax.lora.bank import (
    LoraSpec,
    attach_adapters,
    lora_context,
    merge_adapters,
    multi_linears,
    split_adapters,
    write_slot,
)
from lorafusion_jax.models import random_base
from tests.models.tiny import TINY, packed

PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13]]
SLOTS = [0, -1, 1, 0]
NEW = 6
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)


class Words:
    """The tokenizer of a language whose words are numbers."""

    bos_token_id, eos_token_id, chat_template = None, 2, None

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens  # they may include an end token
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def setup():
    base = random_base(ONE_LAYER, tokenizer=Words())
    paths = [path for path in multi_linears(base.model) if path.endswith(("v_proj", "up_proj"))]
    bank = attach_adapters(base.model, paths, 2, 4)
    for slot in range(2):
        bank = write_slot(bank, slot, LoraSpec(r=4, alpha=8, dropout=0.5), slot + 1)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    bank = bank._replace(
        b=jax.tree.map(lambda b: 0.3 * jax.random.normal(next(keys), b.shape), bank.b)
    )
    return base, bank


def without_a_cache(base, bank, prompt, slot) -> str:
    """The whole row again for each token; padding follows the prompt."""
    rows = 16
    lora = lora_context(bank, jnp.array([slot]), jnp.ones(rows, jnp.uint32), train=False)
    model = merge_adapters(*split_adapters(base.model), bank)
    run = jax.jit(lambda tokens, where: model.logits(model(tokens, *where, lora)))
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        tokens = jnp.asarray(ids + [0] * (rows - len(ids)))
        token = int(run(tokens, packed([len(ids)], rows))[len(ids) - 1].argmax())
        if token == 2:
            break
        ids.append(token)
    return " ".join(map(str, ids[len(prompt) :]))


def test_side_by_side_equals_one_by_one_without_a_cache(setup):
    base, bank = setup
    texts = generate(base, bank, PROMPTS, SLOTS, max_new_tokens=NEW)
    expected = [without_a_cache(base, bank, *row) for row in zip(PROMPTS, SLOTS, strict=True)]
    assert texts == expected
    assert len(set(texts)) == 4  # same prompt, another adapter: another text


def test_base_rows_are_the_bare_base(setup):
    base, bank = setup
    alone = generate(base, None, PROMPTS[:2], max_new_tokens=NEW)
    assert generate(base, bank, ["5 6 7", "8"], [-1, -1], max_new_tokens=NEW) == alone


def test_a_chat_prompt_is_rendered_as_a_users_message():
    class Chat(Words):
        bos_token_id, chat_template = 0, "given"

        def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
            assert messages == [{"role": "user", "content": "5 6"}]
            assert add_generation_prompt and not tokenize
            return "1 5 6 3"

        def encode(self, text, add_special_tokens=True):
            return [0] * add_special_tokens + super().encode(text, False) + [2] * add_special_tokens

    base = random_base(ONE_LAYER, tokenizer=Chat())
    assert module._encode(base, "5 6", chat=True) == [1, 5, 6, 3]
    assert module._encode(base, "5 6", chat=False) == [0, 5, 6]


def test_batches_change_nothing_and_share_a_compilation(setup):
    base, bank = setup
    whole = generate(base, bank, PROMPTS, SLOTS, max_new_tokens=NEW, temperature=0.7)
    before = module._generate._cache_size()
    parts = generate(base, bank, PROMPTS, SLOTS, max_new_tokens=NEW, temperature=0.7, batch_size=3)
    assert parts == whole
    longer = [[*prompt, 20] for prompt in PROMPTS]
    generate(base, bank, longer, SLOTS, max_new_tokens=NEW, temperature=0.9, batch_size=3)
    assert module._generate._cache_size() == before + 1


def test_draws_follow_seed_and_temperature(setup):
    base, _ = setup
    settings = dict(max_new_tokens=NEW)
    hot = [generate(base, None, PROMPTS, temperature=5.0, seed=s, **settings) for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    greedy = generate(base, None, PROMPTS, **settings)
    assert generate(base, None, PROMPTS, temperature=1e-4, **settings) == greedy
    assert generate(base, None, PROMPTS, temperature=5.0, top_p=1e-6, **settings) == greedy
    assert hot[0] != greedy


def test_nucleus_has_the_probability_asked_for():
    """Of probabilities 0.5, 0.3, 0.15, 0.05 and top_p 0.6, the first two are drawn, 5 to 3."""
    logits = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))
    sampling = module._Sampling(jnp.float32(1), jnp.float32(0.6), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.vmap(lambda key: module._draw(sampling, key, logits))(keys))
    shares = np.bincount(drawn, minlength=4) / 4000
    assert shares[0] == shares[2] == 0
    assert abs(shares[1] - 0.625) < 4 * np.sqrt(0.625 * 0.375 / 4000)


def test_stops_at_any_end_token(setup):
    """With the token that a text first changes to as one of two end tokens, it ends before it."""
    base, _ = setup
    prompts = [[token, 7] for token in range(20, 28)]
    texts = generate(base, None, prompts, max_new_tokens=NEW)
    number, words = next((i, text.split()) for i, text in enumerate(texts) if changes(text))
    at = next(i for i, word in enumerate(words) if word != words[0])
    config = dataclasses.replace(base.config, eos_token_ids=(0, int(words[at])))
    stopping = dataclasses.replace(base, config=config)
    stopped = generate(stopping, None, prompts, max_new_tokens=NEW)[number]
    assert stopped == " ".join(words[:at])


def changes(text: str) -> bool:
    return len(set(text.split())) > 1


def test_nothing_to_do(setup):
    assert generate(setup[0], None, []) == []


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (AdapterError, "slot=2: expected -1 (base) or one of 2 slots", dict(slots=[2])),
        (AdapterError, "2 slots for 1 prompts", dict(slots=[0, 1])),
        (ModelError, "'' has no tokens", dict(prompts=[""])),
        (ModelError, "context of 64", dict(max_new_tokens=62)),
        (ModelError, "no chat template", dict(prompts=["5"], chat=True)),
        (ValueError, "max_new_tokens=0", dict(max_new_tokens=0)),
        (ValueError, "top_p=0.0", dict(top_p=0.0)),
    ],
)
def test_refusals(setup, error, words, arguments):
    base, bank = setup
    with pytest.raises(error) as refusal:
        generate(base, bank, **({"prompts": [[5, 6, 7]]} | arguments))
    assert words in str(refusal.value)


def test_no_end_token_is_refused():
    config = dataclasses.replace(TINY, eos_token_ids=())
    with pytest.raises(ModelError, match="names no end token"):
        generate(random_base(config), None, [[1]], max_new_tokens=4)
    with pytest.raises(ModelError, match="has no tokenizer"):
        generate(random_base(TINY), None, ["text"])
