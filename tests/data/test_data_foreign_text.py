"""Start tokens, ends and templates of foreign directories, against what `transformers` makes of the same files."""

import json
import threading

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from deepseek.data import Tokenizer, train_tokenizer
from deepseek.data.foreign_text import MOST_TEMPLATE
from deepseek.errors import DataError

NAMES = ["<s>", "</s>", "<|eot_id|>"]


def directory(path, *, post=None, config=None, generation=None, names=NAMES):
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(n, special=True) for n in names])
    if post:
        ids = [(name, inner.token_to_id(name)) for name in names if name in post]
        inner.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(inner.to_str())
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**base, **(config or {})}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize("post", [None, "<s> $A", "<s>:0 $A:0 </s>:0", "$A </s>"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_the_start_of_a_text_is_that_of_transformers(post, config, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = directory(tmp_path / "t", post=post, config=config)
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs("hé")["input_ids"]
    if expected[-1] == ours.eos_id:  # an end that a tokenizer appends is not for a prompt
        expected = expected[:-1]
    assert ours.prompt("hé") == expected
    assert ours.add_bos == (expected[0] == ours.bos_id)
    assert ours.token_id("<s>") == ours.bos_id


def test_ends_come_from_everywhere(tmp_path):
    plain = Tokenizer.load(directory(tmp_path / "a"))
    end, turn = plain.token_id("</s>"), plain.token_id("<|eot_id|>")
    assert plain.end_ids == {end, turn}  # a name that everybody uses for the end of a turn
    listed = Tokenizer.load(
        directory(tmp_path / "b", generation={"eos_token_id": [end, 7, 10**9, True, "x"]})
    )
    assert listed.end_ids == {end, turn, 7}
    one = Tokenizer.load(directory(tmp_path / "c", generation={"eos_token_id": 9}, names=NAMES[:2]))
    assert one.end_ids == {end, 9}


def test_a_text_is_never_without_ids(tmp_path):
    tokenizer = Tokenizer.load(directory(tmp_path / "a"))
    assert tokenizer.prefix == ()
    assert tokenizer.prompt("") == [tokenizer.bos_id]
    none = Tokenizer.load(directory(tmp_path / "b", config={"bos_token": None}))
    assert none.bos_id is None
    assert none.prompt("") == [none.eos_id]


def test_ours_begin_with_the_document_start(tmp_path):
    tokenizer = train_tokenizer(["some text", "more text"], 300)
    other = train_tokenizer(["some text"], 300, special=("[end]", "[x]"))
    for made in (tokenizer, other):
        made.save(tmp_path)
        for each in (made, Tokenizer.load(tmp_path)):
            assert each.prefix == (0,)
            assert each.bos_id == each.eos_id == 0
            assert each.prompt("some") == [0, *each.encode("some")]
    assert tokenizer.end_ids == {tokenizer.eos_id, tokenizer.token_id("<|end|>")}


def test_templates(tmp_path):
    def of(**config):
        return Tokenizer.load(directory(tmp_path / "t", config=config)).chat_templates

    assert of() == {}
    assert of(chat_template="one") == {"default": "one"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, {"name": 3}, 4]
    assert of(chat_template=named) == {"default": "a", "tool_use": "b"}
    (tmp_path / "t/chat_template.jinja").write_text("file")
    (tmp_path / "t/additional_chat_templates").mkdir()
    (tmp_path / "t/additional_chat_templates/rag.jinja").write_text("rag")
    assert of(chat_template=named) == {"default": "file", "tool_use": "b", "rag": "rag"}
    with pytest.raises(DataError, match="has 1048577 characters, over 1048576"):
        of(chat_template=[{"name": "big", "template": "x" * (MOST_TEMPLATE + 1)}])


def test_saved_and_read_again(tmp_path):
    first = Tokenizer.load(directory(tmp_path / "a", post="<s> $A", generation={"eos_token_id": [257, 258]}))
    first.chat_templates["default"] = "x"
    first.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert (again.prefix, again.end_ids, again.bos_id) == (first.prefix, first.end_ids, first.bos_id)
    assert again.chat_templates == {"default": "x"}


def test_damaged_files_are_named(tmp_path):
    path = directory(tmp_path / "t")
    (path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config.json is damaged"):
        Tokenizer.load(path)


def test_threads_that_parse_special_tokens_do_not_disturb_others(tmp_path):
    """One thread reads ``</s>`` as a token, the other as text: neither ever sees the other's way."""
    tokenizer = Tokenizer.load(directory(tmp_path / "t"))
    plain, parsed, wrong = tokenizer.encode("a</s>"), tokenizer.encode("a</s>", special=True), []
    assert plain != parsed

    def work(special: bool, expected: list[int]) -> None:
        for _ in range(2000):
            if tokenizer.encode("a</s>", special=special) != expected:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=a) for a in ((True, parsed), (False, plain)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
