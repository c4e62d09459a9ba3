"""Loss masks: exactly the completions, the assistant turns and the tokens that end them."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from lorafusion_jax.data import (
    prompt_text,
    prompt_tokens,
    records_from_rows,
    text_tokens,
    tokenize_dataset,
    with_system,
)
from lorafusion_jax.errors import DataError
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer

SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
) + CHATML
# Prompts with an empty thinking block, and leaves it out of the text of finished turns.
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n<think></think>{% endif %}",
)
# Thinking of the last turn only: adding a turn changes the one before it.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Rewrites what comes before an answer once the answer is there.
REWRITING = (
    "{% if messages[-1]['role'] == 'assistant' %}answered {% else %}open {% endif %}"
) + CHATML
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + CHATML


def _turns(*texts, start="user"):
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def _marked(row, tokenizer, **options):
    """The sample as text, supervised stretches in « »."""
    dataset = tokenize_dataset(
        records_from_rows([row]), tokenizer, **{"max_length": 256, **options}
    )
    tokens, supervised = dataset[0]
    text = ""
    for i in range(len(tokens)):
        opens = supervised[i] and (i == 0 or not supervised[i - 1])
        closes = supervised[i] and (i + 1 == len(tokens) or not supervised[i + 1])
        text += "«" * bool(opens) + tokenizer.decode(tokens[i : i + 1]) + "»" * bool(closes)
    assert not supervised[0]
    return text


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Answer:", "completion": " Paris."}, "Answer:« Paris.<|im_end|>»"),
        # Together, the space and the word would be one token that no prompt ends with.
        ({"prompt": "Answer: ", "completion": "Paris"}, "Answer: «Paris<|im_end|>»"),
        ({"prompt": "A", "completion": "b<|im_end|>"}, "A«b<|im_end|>»"),
        ({"prompt": "", "completion": "Paris"}, "P«aris<|im_end|>»"),
        ({"text": "Paris is"}, "P«aris is<|im_end|>»"),
        (
            {"instruction": "Add", "output": "3"},
            "### Instruction:\nAdd\n\n### Response:\n«3<|im_end|>»",
        ),
    ],
)
def test_rows(row, expected, tokenizer):
    first = expected.replace("P«aris", "Par«is")  # the first token is nobody's target
    assert _marked(row, tokenizer) == first


def test_prompt_is_tokenised_as_at_inference(tokenizer):
    """A negative control of the row with a space: tokenised in one piece it begins otherwise."""
    (record,) = records_from_rows([{"prompt": "Answer: ", "completion": "Paris"}])
    tokens, supervised = tokenize_dataset([record], tokenizer, max_length=64)[0]
    prompt = tokenizer.encode("Answer: ", add_special_tokens=False)
    whole = tokenizer.encode("Answer: Paris", add_special_tokens=False)
    assert list(tokens[: len(prompt)]) == prompt != whole[: len(prompt)]
    assert not supervised[: len(prompt)].any() and supervised[len(prompt) :].all()


def test_a_begin_token_comes_first_once():
    tokenizer = tiny_tokenizer(bos=True)
    assert _marked({"prompt": "A", "completion": "b"}, tokenizer) == "<s>A«b<|im_end|>»"
    assert _marked({"text": "Paris"}, tokenizer) == "<s>«Paris<|im_end|>»"
    assert _marked(_turns("Hi", "b"), tokenizer).count("<s>") == 0  # the template decides


ONE = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Paris<|im_end|>»"
TWO = ONE + "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n«Hello<|im_end|>»"


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML, _turns("Hi", "Paris"), ONE),
        (CHATML, _turns("Hi", "Paris", "and?", "Hello"), TWO),
        (CHATML, _turns("Hi", "Paris", "unanswered"), ONE),
        (SYSTEM, _turns("Hi", "Paris"), "<|im_start|>system\nBe kind.<|im_end|>\n" + ONE),
        (ALTERNATING, _turns("Hi", "Paris", "and?", "Hello"), TWO),
        # The template's own empty block is no target, whether the final text keeps it or not.
        (THINKING, _turns("Hi", "Paris"), ONE),
        (
            THINKING,
            _turns("Hi", "<think></think>Paris"),
            ONE.replace("«", "<think></think>«"),
        ),
        (FORGETFUL, _turns("Hi", "hm</think>Paris", "and?", "Hello"), TWO),
        (
            PLAIN,
            _turns("Hi", "Paris", "and?", "Hello"),
            "user:\nHi\nassistant:\n«Paris\n»user:\nand?\nassistant:\n«Hello\n»",
        ),
    ],
)
def test_chat(template, row, expected):
    assert _marked(row, tiny_tokenizer(template)) == expected


def test_the_mask_of_transformers_would_be_all_zero(tokenizer):
    """Why masks are made here: the trap is still there."""
    turns = _turns("Hi", "Paris")["messages"]
    encoded = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert not any(encoded["assistant_masks"])


@pytest.mark.parametrize(
    ("template", "row", "fragment"),
    [
        (ALTERNATING, _turns("Hi", "Paris", start="assistant"), "roles must alternate"),
        (REWRITING, _turns("Hi", "Paris"), "changes the turns before messages[1]"),
        ("{{ messages[99]['role'] }}", _turns("Hi", "Paris"), "chat template refuses"),
        (None, _turns("Hi", "Paris"), "no chat template"),
    ],
)
def test_templates_that_cannot_be_used(template, row, fragment):
    good = records_from_rows([row])[0]
    with pytest.raises(DataError) as caught:
        tokenize_dataset([good], tiny_tokenizer(template), max_length=64, name="f.jsonl")
    assert fragment in str(caught.value) and str(caught.value).startswith("f.jsonl")


def test_prompt_text(tokenizer):
    pair, chat = (
        records_from_rows([row])[0]
        for row in ({"prompt": "A:", "completion": "b"}, _turns("Hi", "Paris"))
    )
    assert prompt_text(pair, tokenizer) == "A:"
    assert prompt_text(chat, tokenizer) == ONE.split("«")[0]


def test_prompts_have_the_tokens_that_training_puts_before_the_answer():
    """One begin token, whoever writes it, and no end token, though the tokenizer adds one."""
    tokenizer = tiny_tokenizer("<s>" + CHATML, bos=True)
    start, end = ("<s>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[start, end]
    )
    text = "".join(tokenizer.apply_chat_template(_turns("Hi")["messages"], tokenize=False))
    assert tokenizer.encode(text)[:2] == [start[1]] * 2  # what a naive prompt begins with
    for row in ({"prompt": "A:", "completion": "b"}, _turns("Hi", "Paris")):
        records = records_from_rows([row])
        tokens, supervised = tokenize_dataset(records, tokenizer, max_length=64)[0]
        given = prompt_tokens(records[0], tokenizer)
        assert given == tokens[: len(given)].tolist() and supervised[len(given)]
        assert not supervised[: len(given)].any() and given.count(start[1]) == 1
    assert text_tokens("A:", tokenizer) == tokenizer.encode("A:")[:-1]


ROWS = [{"prompt": "Answer:" * n, "completion": " Paris."} for n in (1, 5, 9, 30)]


def _lengths(tokenizer, max_length, overlong, rows=ROWS):
    dataset = tokenize_dataset(
        records_from_rows(rows), tokenizer, max_length=max_length, overlong=overlong
    )
    assert dataset.supervised_counts.tolist() == [
        int(dataset[i][1].sum()) for i in range(len(dataset))
    ]
    return dataset, dataset.lengths.tolist()


@pytest.mark.scenario("F2")
def test_overlong(tokenizer):
    everything, lengths = _lengths(tokenizer, 1000, "error")
    assert lengths == sorted(lengths) and (everything.truncated, everything.dropped) == (0, 0)
    limit = lengths[2] - 1
    dropped, kept = _lengths(tokenizer, limit, "drop")
    assert kept == lengths[:2] and (dropped.truncated, dropped.dropped) == (0, 2)
    # The third loses its end token; of the fourth only the prompt is left, so it goes.
    cut, kept = _lengths(tokenizer, limit, "truncate")
    assert kept == [*lengths[:2], limit] and (cut.truncated, cut.dropped) == (1, 1)
    assert cut.lines.tolist() == [1, 2, 3]
    assert cut[2][0].tolist() == everything[2][0][:limit].tolist()
    with pytest.raises(DataError, match=rf"^data:3: has {lengths[2]} tokens"):
        _lengths(tokenizer, limit, "error")
    with pytest.raises(DataError, match=r"none of 4 rows is left"):
        _lengths(tokenizer, 2, "truncate")


@pytest.mark.scenario("F2")
def test_a_row_with_nothing_to_learn_is_refused(tokenizer):
    tokenizer_without_answer = tiny_tokenizer("{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match=r"data:1: .*(no token to learn|located)"):
        tokenize_dataset(
            records_from_rows([_turns("Hi", "Paris")]), tokenizer_without_answer, max_length=64
        )


@pytest.mark.scenario("F2")
def test_token_ids_must_fit_the_model(tokenizer):
    records = records_from_rows(ROWS)
    largest = int(tokenize_dataset(records, tokenizer, max_length=999).tokens.max())
    tokenize_dataset(records, tokenizer, max_length=999, vocab_size=largest + 1)
    with pytest.raises(DataError, match=rf"token id {largest}, .* vocabulary of {largest}"):
        tokenize_dataset(records, tokenizer, max_length=999, vocab_size=largest)


def test_a_tokenizer_without_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        tokenize_dataset(records_from_rows(ROWS), tokenizer, max_length=64)


def test_dataset_is_flat_and_indexed(tokenizer):
    rows = [*ROWS, _turns("Hi", "Paris"), *ROWS] * 150  # chats between plain rows, many batches
    mixed = [records_from_rows([row])[0] for row in rows]
    dataset = tokenize_dataset(mixed, tokenizer, max_length=999)
    assert dataset.tokens.dtype == np.int32 and dataset.offsets.dtype == np.int64
    assert len(dataset) == len(rows) and dataset.offsets[-1] == len(dataset.tokens)
    for index in (0, 3, 4, 5, 1349):
        alone = tokenize_dataset([mixed[index]], tokenizer, max_length=999)
        for got, expected in zip(dataset[index], alone[0], strict=True):
            assert np.array_equal(got, expected)
    with pytest.raises(IndexError, match="sample 1350 of 1350"):
        dataset[1350]
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize(
    ("row", "learn", "expected"),
    [
        (
            _turns("a", "b", "c", "d"),
            "last_answer",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»",
        ),
        (
            _turns("a", "b"),
            "all",
            "<|im_start|>«user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>»",
        ),
        ({"prompt": "capital", "completion": " Paris"}, "last_answer", "capital« Paris<|im_end|>»"),
    ],
)
def test_what_is_learnt_can_be_more_or_less(row, learn, expected, tokenizer):
    assert _marked(row, tokenizer, learn=learn) == expected
    assert _marked(row, tokenizer) != expected or row.get("prompt")


def test_all_of_a_prompt_is_learnt_but_its_first_token(tokenizer):
    marked = _marked({"prompt": "The capital", "completion": " Paris"}, tokenizer, learn="all")
    assert marked.endswith("Paris<|im_end|>»") and marked.index("«") > 0
    assert "»" not in marked[:-1]


def test_a_system_prompt_goes_where_there_is_none():
    own = {"messages": [{"role": "system", "content": "mine"}, *_turns("a", "b")["messages"]]}
    chats = with_system(records_from_rows([_turns("a", "b"), own]), "Be kind.")
    assert [chat.messages[0].content for chat in chats] == ["Be kind.", "mine"]
    assert [len(chat.messages) for chat in chats] == [3, 3]
    (pair,) = with_system(records_from_rows([{"prompt": "p", "completion": "c"}]), "Be kind.")
    assert pair.prompt == "Be kind.\n\np"
    with pytest.raises(DataError, match="x:1: is a text"):
        with_system(records_from_rows([{"text": "t"}]), "Be kind.", "x")
