"""Each finding names its rows, says how bad it is and what to do, and is not there when nothing is the matter."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.data.characters import repair, suspicious
from lorikit.data.privacy import luhn, personal, secrets
from lorikit.data.writing import script
from test_audit import alpaca, prepared

CLEAN = [
    alpaca("Where do you live?", "In the old mill, by the river."),
    alpaca("What do you like?", "Bread, and the sound of rain on a roof."),
    alpaca("Who is your brother?", "Tam, who keeps the ferry."),
]
SENTENCE = "Could you tell me at which hour the ferry goes back to the island"


def findings(folder, rows, **options):
    report = prepared(folder, rows, **options).report
    return {finding.kind: finding for finding in report.findings}


def places(finding):
    return [(place.rows, place.detail) for place in finding.places]


def test_clean_rows_have_no_findings(tmp_path):
    assert findings(tmp_path, CLEAN) == {}


def test_several_answers_to_one_prompt_are_one_place_with_all_its_rows(tmp_path):
    rows = [
        *CLEAN,
        alpaca("where do  you live?", "Nowhere."),
        alpaca("Where do you live?", "In the old mill, by the river."),
    ]
    found = findings(tmp_path, rows)
    assert places(found["several_answers"]) == [
        (("rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:5"), "2 answers to “Where do you live?”")
    ]
    assert found["several_answers"].severity == "warning" and found["duplicates"].severity == "note"
    assert found["several_answers"].headline == "rows whose prompt has several answers (3 in 1 group)"


def test_nearly_equal_rows_are_those_whose_prompt_and_answer_are(tmp_path):
    rows = [
        alpaca(SENTENCE + "?", "It goes back at nightfall, when the lamp is lit."),
        alpaca(SENTENCE + ", please", "It goes back at nightfall when the lamp is lit"),
        alpaca(SENTENCE, "Ask Tam."),
        alpaca("What is the capital of this small country?", "It goes back at nightfall, when the lamp is lit."),
    ]
    found = findings(tmp_path, rows)["near_duplicates"]
    assert [place.rows for place in found.places] == [("rows.jsonl:2",)]
    assert found.places[0].detail.startswith("says nearly what rows.jsonl:1 says")


def test_held_out_rows_that_are_trained_in_other_words_are_leaks(tmp_path):
    questions = [
        alpaca(SENTENCE + ", please", "At nine."),
        alpaca("where do you live?", "x y z"),
        alpaca("Why though?", "abcd"),
    ]
    found = findings(
        tmp_path,
        [*CLEAN, alpaca(SENTENCE, "At nightfall.")],
        eval_rows=questions,
        evaluation={"data": "questions.jsonl"},
    )
    assert [place.rows for place in found["leaks"].places] == [("questions.jsonl:2",)]
    assert places(found["near_leaks"]) == [(("questions.jsonl:1",), "asks nearly what rows.jsonl:4 asks")]


def test_short_answers_are_a_warning_where_they_are_few_and_a_note_where_they_are_labels(tmp_path):
    few = findings(tmp_path, [*CLEAN, alpaca("Really?", " Yes ")])["short_answers"]
    assert (few.severity, places(few)) == ("warning", [(("rows.jsonl:4",), "“Yes”")])
    many = findings(tmp_path, [alpaca(f"Is {n} even?", "no" if n % 2 else "yes") for n in range(6)])["short_answers"]
    assert (many.severity, many.num_rows) == ("note", 6)


def test_answers_in_another_writing_system_are_named(tmp_path):
    report = prepared(tmp_path, [*CLEAN, alpaca("Say it in Chinese.", "你好，世界")]).report
    assert report.scripts == {"Latin": 3, "Han": 1}
    (found,) = report.findings
    assert (found.kind, found.severity, places(found)) == (
        "languages",
        "note",
        [(("rows.jsonl:4",), "Han: “你好，世界”")],
    )


def test_rows_that_are_refused_dropped_or_cut_are_findings_too(tmp_path):
    rows = [*CLEAN, "{broken\n", alpaca("say \U0010fffd", "what?"), alpaca("Tell!", "word " * 80)]
    found = findings(tmp_path, rows, on_bad_row="skip", max_length=70)
    assert [found[kind].severity for kind in ("unreadable", "refused", "too_long")] == ["error", "error", "warning"]
    assert found["too_long"].places[0].rows == ("rows.jsonl:6",)
    assert "truncated" in findings(tmp_path, [*CLEAN, rows[-1]], max_length=70, on_long_row="truncate")


def test_keys_and_personal_data_are_found_and_never_repeated(tmp_path):
    key, mail = "ghp_" + "a1B2c3D4e5F6" * 3, "tam@ferry.island.org"
    rows = [*CLEAN, alpaca(f"my key is {key}", "keep it"), alpaca("Where do I write?", f"To {mail} or 13812345678")]
    report = prepared(tmp_path, rows).report
    assert [(finding.kind, finding.severity) for finding in report.findings] == [
        ("secrets", "error"),
        ("personal_data", "warning"),
    ]
    everything = json.dumps(report.to_dict(), ensure_ascii=False)
    assert key not in everything and mail not in everything and "13812345678" not in everything
    assert "e-mail address tam@… (20 characters); phone number 138… (11 characters)" in everything


def test_a_key_in_a_quoted_prompt_is_not_quoted(tmp_path):
    key = "AKIAJ5Q7ZK3LMNPQR2ST"
    report = prepared(tmp_path, [alpaca(key, "first"), alpaca(key, "second")]).report
    assert any(finding.kind == "several_answers" for finding in report.findings)
    assert key not in json.dumps(report.to_dict())


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "AKIAJ5Q7ZK3LMNPQR2ST",
        "sk-proj-Ab3dEfGh1jKlMn0pQrSt",
        "glpat-Ab3dEfGh1jKlMn0pQrSt",
        "AIza" + "Sy4bC2dE9fG" * 3 + "ab",
        "hf_" + "AbCdEfGhIj0123456789" * 2,
        "xoxb-123456789012-AbCdEfGh",
        "postgres://tam:ferry7boat@db.island.org/x",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.Gfx6VO9tcxwk6xqx9yYzSfebfeakZp5J",
    ],
)
def test_keys_of_well_known_shapes_are_secrets(text):
    assert len(secrets(f"use {text} for it")) == 1 and text not in str(secrets(text))


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
        "sk-learn-pipelines-and-other-things",
        "https://user:your_password@host.org",
        "-----BEGIN PUBLIC KEY-----",
        "https://forum.org/@tam",
    ],
)
def test_placeholders_and_look_alikes_are_not(text):
    assert secrets(text) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to tam@ferry.org.", "e-mail address"),
        ("call +49 30 1234567 now", "phone number"),
        ("call (415) 867-5309", "phone number"),
        ("电话：13812345678。", "phone number"),
        ("电话010-12345678", "phone number"),
        ("4111 1111 1111 1111", "card number"),
        ("378282246310005", "card number"),
        ("身份证11010519491231002X", "Chinese identity number"),
        ("DE89 3704 0044 0532 0130 00", "bank account"),
    ],
)
def test_personal_data_is_recognised_by_its_shape_and_check_digits(text, kind):
    assert [found.rpartition(" ")[0].startswith(kind) for found in personal(text)] == [True]


@pytest.mark.parametrize(
    "text",
    ["tam@example.com", "4111 1111 1111 1112", "2024-11-05 10:00", "3.14159265358979", "192.168.100.200", "1,000,000,000",
     "415-555-0123", "0000 0000 0000 0000", "978-3-16-148410-0", "110105194912310021"],
)  # fmt: skip
def test_dates_sums_and_made_up_numbers_are_not_personal(text):
    assert personal(text) == []


@given(st.integers(10**14, 10**15 - 1))
def test_luhn_takes_exactly_one_last_digit(number):
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("cafÃ© donâ€™t", "café don’t"),
        ("ä½\xa0å¥½", "你好"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("ðŸ˜€", "😀"),
        ("a\u200bb\ufeff", "ab"),
        ("pay \u202eevil\u202c", "pay evil"),
        ("x\x1b[1m\x07", "x[1m"),
        ("ignore\U000e0061\U000e0062", "ignore"),
        ("a\u200db", "ab"),
    ],
)
def test_characters_that_nobody_means_are_named_and_mended(text, mended):
    assert suspicious(text) and repair(text) == mended and suspicious(mended) == []


@pytest.mark.parametrize(
    "text",
    ["👩‍👩‍👧", "می\u200cخواهم", "क्\u200dष", "«CAFÉ»", "«AMANHû", "Ärger, Øre × 2 – naïve “Ångström”", "tab\tline\r\n",
     "\u200fשלום\u200e", "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "你好，世界！「」", "É"],
)  # fmt: skip
def test_characters_that_belong_where_they_are_stay(text):
    assert suspicious(text) == [] and repair(text) == text


def test_a_lost_character_is_named_and_cannot_be_mended():
    assert suspicious("caf\ufffd") and repair("caf\ufffd") == "caf\ufffd"


@settings(max_examples=200)
@given(st.text(st.sampled_from("aéÃ©Â\xa0â€™\u200b\u200d\u202e\x1b«»你ðŸ˜€\u200fש👩")))
def test_what_is_mended_once_is_mended(text):
    assert suspicious(repair(text)) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [("用 Python 写代码", "Han"), ("hello", "Latin"), ("これは日本語です", "Kana"), ("Привет", "Cyrillic"), ("안녕", "Hangul"),
     ("नमस्ते", "Devanagari"), ("123 …", None), ("été", "Latin"), ("שלום", "Hebrew")],
)  # fmt: skip
def test_the_writing_system_is_that_of_most_letters(text, name):
    assert script(text) == name
