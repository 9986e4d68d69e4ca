"""Conversations: the tokens that the model's own template makes, and whose each is."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from tcsae.cache.format.layout import ROLES, SPECIAL, RowBlock, of_role
from tcsae.errors import TextError, UsageError
from tcsae.evaluate.model.heldout_text import HeldOutText
from tcsae.extract.config import ModelSource, TextSource, command_line, extract_config, text_source
from tcsae.extract.model.load import outline_model
from tcsae.extract.text.chat import ROLE_SHIFT, ChatTemplate, Conversation, conversation_of
from tcsae.extract.text.open import resolve_text
from tcsae.extract.text.rows import row_blocks
from tiny import tiny_text, tiny_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<bos>system\nBe kind.<eos>\n{% endif %}"
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] | trim }}<eos>\n{% endfor %}"
)
TALK = [("user", "Who carries seven letters? "), ("assistant", "The old king, before dawn."), ("user", "Why?")]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def tokenizer_with(template, kind="llama"):
    tokenizer = tiny_tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer


def made(messages, template=CHATML, kind="llama"):
    carried = ChatTemplate(tokenizer_with(template, kind), "tiny").tokens(Conversation(tuple(messages)), "document 3")
    return carried & ((1 << ROLE_SHIFT) - 1), carried >> ROLE_SHIFT


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_tokens_are_those_of_the_template_and_roles_those_of_the_contents(kind):
    tokenizer = tokenizer_with(CHATML, kind)
    ids, roles = made(TALK, kind=kind)
    rows = [{"role": role, "content": content} for role, content in TALK]
    theirs = tokenizer.apply_chat_template(rows, tokenize=True, return_dict=False)
    assert [tokenizer.bos_token_id, *ids.tolist()] == theirs
    for role in ("user", "assistant"):
        said = tokenizer.decode(ids[roles == 1 + ROLES.index(role)])
        assert said == "".join(content.strip() for who, content in TALK if who == role)
    assert not roles[np.isin(ids, tokenizer.all_special_ids)].any()
    assert "Be kind" not in tokenizer.decode(ids[roles > 0])


def test_a_special_token_that_a_message_spells_is_text():
    tokenizer = tokenizer_with(CHATML)
    talk = [("user", "Say <eos> and <bos>user"), ("assistant", "No.")]
    ids, roles = made(talk)
    assert tokenizer.decode(ids[roles == 2]) == talk[0][1]
    assert not np.isin(ids[roles > 0], tokenizer.all_special_ids).any()
    assert (ids == tokenizer.eos_token_id).sum() == 3


def test_a_prompt_of_the_template_that_says_the_same_is_not_taken_for_the_message():
    ids, roles = made([("user", "Be kind."), ("assistant", "Be kind.")])
    assert tokenizer_with(CHATML).decode(ids[roles == 3]) == "Be kind."
    assert (roles == 2).sum() == (roles == 3).sum() > 0


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "the tokenizer of tiny has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses document 3: roles must alternate"),
        ("{{ messages[0]['content'] }}", "does not show every message of document 3 once and as it is"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "does not show every message of document 3 once and as it is",
        ),
    ],
)
def test_what_a_template_cannot_do_is_a_sentence(template, sentence):
    with pytest.raises(TextError, match=sentence):
        made(TALK, template)


def test_a_template_that_prints_the_date_prints_the_same_on_every_day():
    ids, _ = made([("user", "Why?")], "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert tokenizer_with(CHATML).decode(ids).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "No."}],
        [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "No."}],
        {"role": ["user", "assistant"], "content": ["Hm?", "No."]},
        [{"role": "user", "content": [{"type": "text", "text": "Hm?"}]}, {"role": "assistant", "content": "No."}],
    ],
)
def test_every_way_to_write_messages(value):
    assert conversation_of(value, "it").messages == (("user", "Hm?"), ("assistant", "No."))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("Hm?", "it holds no messages: --chat-template wants lists of role and content"),
        ([{"role": "narrator", "content": "x"}], "it has a message of the role 'narrator': roles are system, user"),
        ([{"role": "user", "content": 3}], "it has a message whose content is no text but int"),
    ],
)
def test_what_is_wrong_with_messages_is_said(value, sentence):
    with pytest.raises(TextError, match=sentence):
        conversation_of(value, "it")


@pytest.fixture
def chat(tiny_llama, tmp_path):
    """An outline whose tokenizer has a template, and the text of twelve conversations."""
    outline = outline_model(ModelSource(str(tiny_llama)))
    outline.tokenizer.chat_template = CHATML
    path = tmp_path / "talks.jsonl"
    with path.open("w") as file:
        for number in range(12):
            talk = [(("human", "gpt")[turn % 2], tiny_text(10 * number + turn, 12)) for turn in range(4)]
            rows = [{"from": role, "value": text} for role, text in talk]
            file.write(json.dumps({"conversations": rows, "topic": "ab"[number % 2]}) + "\n")
    return outline, TextSource(str(path), chat_template=True, context=16, held_out=0.3, label_column="topic")


def test_rows_of_conversations_have_flags_for_roles(chat):
    outline, source = chat
    block = RowBlock.concatenate([block for block, _ in row_blocks(source, outline)])
    special = (block.flags_BT & SPECIAL) > 0
    assert (special == np.isin(block.tokens_BT, outline.special_token_ids)).all()
    user, assistant = of_role(block.flags_BT, "user"), of_role(block.flags_BT, "assistant")
    assert not (user & assistant).any()
    assert min(user.sum(), assistant.sum()) > 100
    assert not (special & (user | assistant)).any()
    assert block.tokens_BT.max() < outline.vocab_size
    with pytest.raises(UsageError, match="no role 'narrator': choose among system, user, assistant, tool"):
        of_role(block.flags_BT, "narrator")


def test_the_manifest_has_the_template_and_leads_back_to_the_text(chat):
    outline, source = chat
    identity = resolve_text(source, outline)
    assert identity.template_sha256 == ChatTemplate(outline.tokenizer, "tiny").sha256
    assert identity.text_column == "conversations"
    again = text_source(identity)
    assert again.chat_template
    assert resolve_text(again, outline) == identity
    outline.tokenizer.chat_template = CHATML.replace("kind", "brief")
    assert resolve_text(source, outline).fingerprint != identity.fingerprint
    plain = {name: value for name, value in identity.model_dump().items() if name != "label_column"}
    assert "chat_template" not in plain, "a field that older versions would refuse"


def test_messages_without_the_option_and_the_option_without_messages(chat, corpus):
    outline, source = chat
    with pytest.raises(TextError, match="has no column 'text'"):
        next(row_blocks(TextSource(source.dataset), outline))
    plain = TextSource(source.dataset, text_column="conversations")
    with pytest.raises(TextError, match="holds messages: put them into words with --chat-template"):
        next(row_blocks(plain, outline))
    with pytest.raises(TextError, match=r"text files, and --chat-template is for rows of messages"):
        next(row_blocks(TextSource(str(corpus), chat_template=True), outline))


def test_the_command_that_goes_on_names_the_option():
    config = extract_config(layers=1, dataset="talks.jsonl", chat_template=True, model="m")
    assert "--chat-template" in command_line(config).split()


def test_only_one_role_is_measured(chat):
    outline, source = chat
    blocks = [block for block, _ in row_blocks(source, outline, held_out=True)]
    text = HeldOutText.gather(blocks, 1000, only="assistant")
    flags_RT = np.concatenate([block.flags_BT for block in blocks])
    np.testing.assert_array_equal(text.real_RT, of_role(flags_RT, "assistant"))
    with pytest.raises(TextError, match="no token in a message of the role 'tool'"):
        HeldOutText.gather(blocks, 1000, only="tool")
