"""A tokenizer is what its folder says, all files of it, or an error."""

import pytest
from tokenizers import Tokenizer

from influence.runtime.corpus.chat import Template
from influence.runtime.corpus.tokenizer import check_tokenizer, read_tokenizer
from tests.runtime.corpus.make import BEGIN, END, TEXTS, put, write_tokenizer


def test_special_tokens_are_those_of_the_files(tmp_path):
    folder = write_tokenizer(
        tmp_path, eos_token=END, bos_token={"content": BEGIN, "lstrip": False}
    )
    found = read_tokenizer(folder)
    own = found.tokenizer.token_to_id
    assert (found.bos, found.eos, found.pad) == (own(BEGIN), own(END), None)
    assert found.separator == found.eos
    assert found.size == found.tokenizer.get_vocab_size()
    same = read_tokenizer(folder / "tokenizer.json")
    assert (same.bos, same.eos, same.sha256) == (found.bos, found.eos, found.sha256)


def test_ids_may_come_from_the_model_s_configuration_or_be_given(tmp_path):
    folder = write_tokenizer(tmp_path)
    assert read_tokenizer(folder).eos is None
    with pytest.raises(ValueError, match="no end-of-text token to put between docu"):
        _ = read_tokenizer(folder).separator
    put(folder / "generation_config.json", {"eos_token_id": [7, 8]})
    assert read_tokenizer(folder).eos == 7
    put(folder / "config.json", {"eos_token_id": 5, "bos_token_id": None})
    assert read_tokenizer(folder).eos == 5
    assert read_tokenizer(folder, eos=3, bos=4).eos == 3
    assert read_tokenizer(folder, eos=3, bos=4).bos == 4


def test_a_text_is_whole_whatever_the_file_says_of_cutting_and_filling_up(tmp_path):
    folder = write_tokenizer(tmp_path)
    whole = read_tokenizer(folder).encode(TEXTS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    again = read_tokenizer(folder).encode(TEXTS)
    assert [x.ids for x in again] == [x.ids for x in whole]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path))
    check_tokenizer(tokenizer, tokenizer.size)
    check_tokenizer(tokenizer, tokenizer.size + 47)  # Padded, as models often are.
    said = rf"has {tokenizer.size} token ids, up to {tokenizer.size - 1} \('<\|begin"
    with pytest.raises(ValueError, match=said):
        check_tokenizer(tokenizer, tokenizer.size - 1)


def test_a_tokenizer_that_ends_texts_otherwise_than_the_model_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path, eos_token=END)
    eos = read_tokenizer(folder).eos
    put(folder / "config.json", {"eos_token_id": [1, eos]})
    tokenizer = read_tokenizer(folder)
    check_tokenizer(tokenizer, 1000, {"eos_token_id": eos, "bos_token_id": 1})
    with pytest.raises(ValueError, match=rf"eos token is {eos} .*configuration says 1"):
        check_tokenizer(tokenizer, 1000, {"eos_token_id": 1})
    put(folder / "config.json", {"eos_token_id": [1, 2]})
    with pytest.raises(ValueError, match=r"says 1, 2\. .*`read_tokenizer\(…, eos=1\)`"):
        read_tokenizer(folder)
    assert read_tokenizer(folder, eos=1).eos == 1
    # One of two files is enough: chat models end turns otherwise than they ended texts.
    put(folder / "generation_config.json", {"eos_token_id": [1, eos]})
    assert read_tokenizer(folder).eos == eos


def test_what_can_t_be_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*tokenizer\.json"):
        read_tokenizer(tmp_path)
    folder = write_tokenizer(tmp_path, eos_token="<|no such|>")
    with pytest.raises(
        ValueError, match=r"eos token '<\|no such\|>' is not in its voc"
    ):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is no tokenizer that can be"
    ):
        read_tokenizer(folder)


CHAT = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "odd" %}{{ raise_exception("No odd roles.") }}{% endif %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {{- "<" + message.role + ">" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{ message.content | tojson }}{% endif %}
    {{- eos_token }}
{% endfor %}
"""
TALK = [
    {"role": "user", "content": "a < b & é"},
    {"role": "assistant", "content": "yes"},
    {"role": "stop", "content": ""},
]


@pytest.mark.parametrize("where", ["config", "named", "file"])
def test_a_conversation_is_the_text_its_template_makes(tmp_path, where):
    config = {
        "config": {"chat_template": CHAT},
        "named": {
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": CHAT},
            ]
        },
        "file": {"chat_template": "no"},
    }[where]
    folder = write_tokenizer(tmp_path, eos_token=END, bos_token=BEGIN, **config)
    if where == "file":
        (folder / "chat_template.jinja").write_text(CHAT)
    text = read_tokenizer(folder).render(TALK)
    assert text == f'{BEGIN}<user>"a < b & é"{END}\n<assistant>yes{END}\n'


def test_a_template_is_part_of_the_tokenizer(tmp_path):
    plain = read_tokenizer(write_tokenizer(tmp_path / "plain"))
    chat = read_tokenizer(write_tokenizer(tmp_path / "chat", chat_template=CHAT))
    assert plain.sha256 != chat.sha256
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        plain.render(TALK)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (CHAT, "No odd roles"),
        ("{% for x in messages %}", "Unexpected end of template"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe|undefined"),
        ("{% include 'secret' %}", "no loader"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ range(10000000) | list }}", "Range too big"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_a_template_reaches_nothing_but_the_messages(source, said):
    with pytest.raises(ValueError, match=f"chat template: .*({said})"):
        Template(source, {})([{"role": "odd", "content": "x"}])
