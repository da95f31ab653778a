"""Which texts prompts quote, and which spellings count as one text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.detectors.quotes import plain, quoted_texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a sign that says “OPEN”", ["OPEN"]),
        ("ein Schild: „Zimmer frei“ und „Bad“", ["Zimmer frei", "Bad"]),
        ("napis „Otwarte” na szybie", ["Otwarte"]),
        ("une enseigne « Ouvert »", ["Ouvert"]),
        ("et skilt med »Åben« på", ["Åben"]),
        ("kyltti »Auki» ja »Kiinni»", ["Auki", "Kiinni"]),
        ("en skylt med ”Öppet” och ”Stängt”", ["Öppet", "Stängt"]),
        ("看板に「営業中」と『本日』", ["営業中", "本日"]),
        ('写着"爵士"的海报', ["爵士"]),
        ('写着"7"和"好"。', ["7", "好"]),
        ("写着＂爵士＂的海报", ["爵士"]),
        ("a sign that says “OPEN", []),
        ("a “JAZZ and “POP” sign", ["POP"]),
        ('mixed “JAZZ" marks', ["JAZZ"]),
        ('“He said "HI" there” on a page', ['He said "HI" there']),
    ],
)
def test_double_quotes_of_many_languages_are_quotes(prompt, texts):
    assert list(quoted_texts(prompt)) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a sign that says 'OPEN'", ["OPEN"]),
        ("the shop's sign says 'DON'T PANIC' in red", ["DON'T PANIC"]),
        ("‘DON’T PANIC’ on the shop’s sign", ["DON’T PANIC"]),
        ("ein Schild ‚Bar‘ und ‹Café›", ["Bar", "Café"]),
        ("a compass with 'N' at its top", ["N"]),
        ("the boys' and the girls' rooms", []),
        ("rock 'n' roll in the '60s, 'twas loud", []),
        ("a '90s poster that says 'DISCO'", ["DISCO"]),
        ("it's \"DON'T\" on the dog's bowl", ["DON'T"]),
        ("'vintage' letters that say \"OPEN\"", ["OPEN"]),
        ("an empty \"\" sign that says 'OPEN'", ["OPEN"]),
    ],
)
def test_single_quotes_are_told_from_apostrophes_and_count_only_without_double_quotes(prompt, texts):
    assert list(quoted_texts(prompt)) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a 12" vinyl that says "JAZZ"', ["JAZZ"]),
        ("a 12” vinyl that says “JAZZ”", ["JAZZ"]),
        ('a 24"x36" poster that says "ART", beside a 7" record', ["ART"]),
        ('a 5\'10" man who holds "HI"', ["HI"]),
        ('a 12" and a 7" record', []),
        ('a sign "24" x 36" PRINTS" in a window', ['24" x 36" PRINTS']),
        ('a sign "ROOM 12" above a 7" record', ["ROOM 12"]),
        ('"OPEN 24" and "7 DAYS"', ["OPEN 24", "7 DAYS"]),
        ('the number "7" beside "ELEVEN"', ["7", "ELEVEN"]),
    ],
)
def test_inch_marks_are_not_quotes(prompt, texts):
    assert list(quoted_texts(prompt)) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('"a cat on a mat"', []),
        ('"a cat on a mat".', []),
        ("“a cat on a mat”", []),
        ("'a cat's mat'", []),
        ("「猫がいる」", []),
        ('"a sign that says ""OPEN"" there"', ["OPEN"]),
        ('"a sign that says ""OPEN"""', ["OPEN"]),
        ('"a sign that says "OPEN" on a wall"', ["OPEN"]),
        ('"a sign that says \\"OPEN\\""', ["OPEN"]),
        ("“a sign that says ‘OPEN’”", ["OPEN"]),
        ('"SALE" and "OFF"', ["SALE", "OFF"]),
        ("“SALE”, “OFF”", ["SALE", "OFF"]),
    ],
)
def test_quotes_around_a_whole_prompt_are_removed(prompt, texts):
    assert list(quoted_texts(prompt)) == texts


@pytest.mark.parametrize("prompt", ["", '"', '""', 'an empty "" sign', 'a " " sign', 'a "\u200b\u00a0" sign', 'a "CAT'])
def test_blank_texts_and_marks_without_a_partner_are_ignored(prompt):
    assert quoted_texts(prompt) == ()


def test_several_texts_keep_their_order_and_count_once():
    assert quoted_texts('"OFF", then "SALE" and "off" again; "24/7"') == ("OFF", "SALE", "24/7")


def test_published_prompts_give_the_text_that_the_published_code_takes(shared):
    for prompt in (shared / "data" / "ocr_prompts.txt").read_text().splitlines():
        assert quoted_texts(prompt) == (prompt.split('"')[1].strip(),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ＳＡＬＥ　５０％", "sale 50%"),
        ("ﬁne ﬂour", "FINE FLOUR"),
        ("don’t", "DON'T"),
        ("“Hi”", '"hi"'),
        ("Cafe\u0301", "CAFÉ"),
        ("ガ", "ｶﾞ"),
        ("Straße", "STRASSE"),
        ("İSTANBUL", "istanbul"),
        ("ISPARTA", "ısparta"),
        ("ΣΟΦΟΣ", "σοφος"),
        ("a – b—c\u2010d", "a-b-c-d"),
        ("a\u00a0b\u3000c\u2009d\u202fe\tf\u200bg\u00adh\ufeffi", "abcdefghi"),
        ("I ❤\ufe0f NY", "i❤ny"),
        ("JAZZ™ №5…", "jazztm no 5..."),
    ],
)
def test_spellings_that_look_alike_are_one_text(one, other):
    assert plain(one) == plain(other)


@pytest.mark.parametrize(("one", "other"), [("x²", "x2"), ("①", "1"), ("½", "1/2"), ("café", "cafe"), ("O", "0")])
def test_spellings_that_look_different_are_different_texts(one, other):
    assert plain(one) != plain(other)


@given(st.text(max_size=12))
def test_plain_text_stays_unchanged_and_unicode_forms_do_not_matter(text):
    assert plain(plain(text)) == plain(text)
    assert plain(unicodedata.normalize("NFD", text)) == plain(unicodedata.normalize("NFC", text))


@given(st.text(max_size=30))
def test_any_prompt_can_be_parsed_and_contains_the_texts_it_quotes(prompt):
    for text in quoted_texts(prompt):
        assert plain(text) in plain(prompt)
