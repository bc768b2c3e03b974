"""Answer extraction and checking against a hand-made table: it fails closed, letters are positions, numbers are exact."""

import pytest

import common

AB = ["9", "12"]
NUMBERS = ["7", "11", "15", "18"]
WORDS = ["cat", "dog", "(c) bird", "cow"]
LETTER_TEXTS = ["B", "A", "D"]  # option texts that look like letters: the position counts

TABLE = [  # response, gold answer, choices, right?
    # free form: the final answer in the forms people use
    ("Answer : 7", "7", None, True), ("Answer: 7", "7", None, True), ("answer: 7", "7", None, True), ("ANSWER: 7.", "7", None, True),
    ("The answer is 7.", "7", None, True), ("So the answer is: 7", "7", None, True), ("3 + 4 = 7\nAnswer : 7", "7", None, True),
    ("**Answer:** 7", "7", None, True), ("**Answer: 7**", "7", None, True), ("\\boxed{7}", "7", None, True), ("so $\\boxed{7}$.", "7", None, True),
    ("\\boxed{\\frac{3}{4}}", "3/4", None, True), ("Answer: \\frac{1}{2}", "0.5", None, True), ("Answer: $7$", "7", None, True),
    ("Answer: 8", "7", None, False), ("Answer: 77", "7", None, False), ("Answer: -7", "7", None, False), ("Answer: 7.5", "7", None, False),
    # nothing that can be read is wrong
    ("", "7", None, False), ("7", "7", None, False), ("I think it is seven", "7", None, False), ("Answer :", "7", None, False),
    ("Answer :\n7", "7", None, True), ("\\boxed{}", "7", None, False), ("Answer: .", "7", None, False), ("   \n ", "7", None, False),
    # two final answers that differ are none; the same one twice is one
    ("Answer: 7\nAnswer: 8", "7", None, False), ("Answer: 8\nAnswer: 7", "7", None, False), ("Answer: 7\nAnswer: 7", "7", None, True),
    ("\\boxed{7} or \\boxed{8}", "7", None, False), ("Answer: 7 or 8", "7", None, False), ("Answer: 7, 8", "7", None, False),
    # numbers: exact value, whatever the dress
    ("Answer: 1,250", "1250", None, True), ("Answer: 1250", "1,250", None, True), ("Answer: 1,25", "125", None, False), ("Answer: 7.0", "7", None, True),
    ("Answer: 07", "7", None, True), ("Answer: +7", "7", None, True), ("Answer: -3.50", "-3.5", None, True), ("Answer: .5", "0.5", None, True),
    ("Answer: 50%", "50", None, True), ("Answer: 45°", "45", None, True), ("Answer: 45^\\circ", "45", None, True), ("Answer: 45^{\\circ}", "45", None, True),
    ("Answer: 7 cm", "7", None, True), ("Answer: $1,250.00", "1250", None, True), ("Answer: 3/4", "0.75", None, True), ("Answer: 3/0", "3", None, False),
    ("Answer: 6.999999", "7", None, False), ("Answer: 1e3", "1", None, False), ("Answer: 7 + 1", "8", None, False), ("Answer: nan", "7", None, False),
    # words
    ("Answer: Paris", "paris", None, True), ("Answer:  New   York ", "new york", None, True), ("Answer: \\text{yes}", "Yes", None, True),
    ("Answer: no", "yes", None, False), ("Answer: not yes", "yes", None, False), ("The answer is yes, because it is", "yes", None, False),
    # multiple choice: a letter is a position
    ("Answer : B", "B", AB, True), ("Answer : b", "B", AB, True), ("Answer: (B)", "B", AB, True), ("Answer: B.", "B", AB, True), ("Answer: B)", "B", AB, True),
    ("Answer: (B) 12", "B", AB, True), ("Answer: B: 12", "B", AB, True), ("Answer: 12", "B", AB, True), ("Answer: B", "12", AB, True), ("Answer: 12.", "12", AB, True),
    ("Answer: A", "B", AB, False), ("Answer: 9", "B", AB, False), ("Answer: (B) 9", "B", AB, False), ("Answer: A or B", "B", AB, False),
    ("Answer: A, B", "B", AB, False), ("Answer: C", "B", AB, False), ("Answer: AB", "B", AB, False), ("Answer: both", "B", AB, False), ("Answer: 1", "B", AB, False),
    ("Answer: (D)", "D", NUMBERS, True), ("Answer: 18", "D", NUMBERS, True), ("Answer: E", "D", NUMBERS, False), ("Answer: 11 or 18", "D", NUMBERS, False),
    ("Answer: C", "(c) bird", WORDS, True), ("Answer: (c) bird", "C", WORDS, True), ("Answer: Dog", "B", WORDS, True), ("Answer: dogs", "B", WORDS, False),
    ("Answer: A", "A", LETTER_TEXTS, True), ("Answer: B", "A", LETTER_TEXTS, False), ("Answer: D", "C", LETTER_TEXTS, True),
]


@pytest.mark.parametrize("response, gold, choices, right", TABLE)
def test_answer_is_judged_as_a_careful_person_would(response, gold, choices, right):
    assert common.is_correct(common.extract_answer(response), {"answer": gold, "choices": choices}) is right


def test_the_table_has_many_cases_of_both_kinds():
    assert len(TABLE) >= 80 and 35 <= sum(right for *_, right in TABLE) <= len(TABLE) - 35


def test_equal_answers_count_as_one_vote():
    assert common.canonical("7.0", None) == common.canonical(" 7 ", None) == common.canonical("14/2", None)
    assert common.canonical("(b)", AB) == common.canonical("12", AB) == "B"
    assert common.canonical("A or B", AB) is None and common.canonical(None, AB) is None
