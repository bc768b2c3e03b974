"""Answers against a hand-made table: it fails closed, letters are positions, numbers are exact."""

import time

import pytest

import common


def choice_index(answer, choices):
    """The position of the option that an answer names, or None."""
    letter = common.canonical(answer, {"choices": choices})
    return None if letter is None else common.LETTERS.index(letter)


AB = ["9", "12"]
NUMBERS = ["7", "11", "15", "18"]
WORDS = ["cat", "dog", "(c) bird", "cow"]
LETTER_TEXTS = ["B", "A", "D"]  # option texts that look like letters: the position counts

TABLE = [  # response, gold answer, choices, right?
    # free form: the final answer in the forms people use
    ("Answer : 7", "7", None, True),
    ("Answer: 7", "7", None, True),
    ("answer: 7", "7", None, True),
    ("ANSWER: 7.", "7", None, True),
    ("The answer is 7.", "7", None, True),
    ("So the answer is: 7", "7", None, True),
    ("3 + 4 = 7\nAnswer : 7", "7", None, True),
    ("**Answer:** 7", "7", None, True),
    ("**Answer: 7**", "7", None, True),
    ("\\boxed{7}", "7", None, True),
    ("so $\\boxed{7}$.", "7", None, True),
    ("\\boxed{\\frac{3}{4}}", "3/4", None, True),
    ("Answer: \\frac{1}{2}", "0.5", None, True),
    ("Answer: $7$", "7", None, True),
    ("Answer: 8", "7", None, False),
    ("Answer: 77", "7", None, False),
    ("Answer: -7", "7", None, False),
    ("Answer: 7.5", "7", None, False),
    # nothing that can be read is wrong
    ("", "7", None, False),
    ("7", "7", None, False),
    ("I think it is seven", "7", None, False),
    ("Answer :", "7", None, False),
    ("Answer :\n7", "7", None, True),
    ("\\boxed{}", "7", None, False),
    ("Answer: .", "7", None, False),
    ("   \n ", "7", None, False),
    # two final answers that differ are none; the same one twice is one
    ("Answer: 7\nAnswer: 8", "7", None, False),
    ("Answer: 8\nAnswer: 7", "7", None, False),
    ("Answer: 7\nAnswer: 7", "7", None, True),
    ("\\boxed{7} or \\boxed{8}", "7", None, False),
    ("Answer: 7 or 8", "7", None, False),
    ("Answer: 7, 8", "7", None, False),
    # numbers: exact value, whatever the dress
    ("Answer: 1,250", "1250", None, True),
    ("Answer: 1250", "1,250", None, True),
    ("Answer: 1,25", "125", None, False),
    ("Answer: 7.0", "7", None, True),
    ("Answer: 07", "7", None, True),
    ("Answer: +7", "7", None, True),
    ("Answer: -3.50", "-3.5", None, True),
    ("Answer: .5", "0.5", None, True),
    ("Answer: 50%", "50", None, True),
    ("Answer: 45°", "45", None, True),
    ("Answer: 45^\\circ", "45", None, True),
    ("Answer: 45^{\\circ}", "45", None, True),
    ("Answer: 7 cm", "7", None, True),
    ("Answer: $1,250.00", "1250", None, True),
    ("Answer: 3/4", "0.75", None, True),
    ("Answer: 3/0", "3", None, False),
    ("Answer: 6.999999", "7", None, False),
    ("Answer: 1e3", "1", None, False),
    ("Answer: 7 + 1", "8", None, False),
    ("Answer: nan", "7", None, False),
    ("Answer: 7 millions", "7", None, False),
    ("Answer: 7 bn", "7", None, False),
    ("Answer: 7 squared", "7", None, False),
    ("Answer: 3 quarters", "3", None, False),
    ("Answer: 7 halves", "7", None, False),
    ("Answer: 7 of", "7", None, False),
    ("Answer: 2a", "2", None, False),
    ("Answer: 2", "2a", None, False),
    ("Answer: 2n", "2", None, False),
    ("Answer: 5 am", "5 pm", None, False),
    ("Answer: 7 g", "7", None, True),
    ("Answer: 7 times", "7", None, True),
    ("Answer: 7 people", "7", None, True),
    # Markdown and lead-ins
    ("**Answer:**\n7", "7", None, True),
    ("**Answer:**\n\nB", "B", AB, True),
    ("**Final Answer:** 7", "7", None, True),
    ("Answer: The answer is 7.", "7", None, True),
    ("**Answer:** The correct answer is B.", "B", AB, True),
    ("**Answer:**\nB\nThe answer is B.", "B", AB, True),
    ("Answer: 7, for the answer is 8", "8", None, False),
    ("Answer: **B**. 12", "B", AB, True),
    ("Answer: **B**: 12", "B", AB, True),
    ("**Answer: 7.**", "7", None, True),
    ("**Answer:** **7**", "7", None, True),
    ("**Answer:**", "7", None, False),
    # words
    ("Answer: Paris", "paris", None, True),
    ("Answer:  New   York ", "new york", None, True),
    ("Answer: \\text{yes}", "Yes", None, True),
    ("Answer: no", "yes", None, False),
    ("Answer: not yes", "yes", None, False),
    ("The answer is yes, because it is", "yes", None, False),
    # multiple choice: a letter is a position
    ("Answer : B", "B", AB, True),
    ("Answer : b", "B", AB, True),
    ("Answer: (B)", "B", AB, True),
    ("Answer: B.", "B", AB, True),
    ("Answer: B)", "B", AB, True),
    ("Answer: (B) 12", "B", AB, True),
    ("Answer: B: 12", "B", AB, True),
    ("Answer: 12", "B", AB, True),
    ("Answer: B", "12", AB, True),
    ("Answer: 12.", "12", AB, True),
    ("Answer: A", "B", AB, False),
    ("Answer: 9", "B", AB, False),
    ("Answer: (B) 9", "B", AB, False),
    ("Answer: A or B", "B", AB, False),
    ("Answer: B. 12.0", "B", AB, True),
    ("Answer: (B) 12 degrees", "B", AB, True),
    ("Answer: (B) 12.5", "B", AB, True),
    ("Answer: 12.0", "B", AB, True),
    ("Answer: 12 apples", "B", AB, True),
    ("Answer: (B) 5 m", "B", ["5 m", "5 cm"], False),
    ("Answer: 5", "B", ["5 m", "5 cm"], False),
    ("Answer: 0.5", "A", ["1/2", "0.50"], False),
    ("Answer: A, B", "B", AB, False),
    ("Answer: C", "B", AB, False),
    ("Answer: AB", "B", AB, False),
    ("Answer: both", "B", AB, False),
    ("Answer: 1", "B", AB, False),
    ("Answer: (D)", "D", NUMBERS, True),
    ("Answer: 18", "D", NUMBERS, True),
    ("Answer: E", "D", NUMBERS, False),
    ("Answer: 11 or 18", "D", NUMBERS, False),
    ("Answer: C", "(c) bird", WORDS, True),
    ("Answer: (c) bird", "C", WORDS, True),
    ("Answer: Dog", "B", WORDS, True),
    ("Answer: dogs", "B", WORDS, False),
    ("Answer: A", "A", LETTER_TEXTS, True),
    ("Answer: B", "A", LETTER_TEXTS, False),
    ("Answer: D", "C", LETTER_TEXTS, True),
]


@pytest.mark.parametrize("response, gold, choices, right", TABLE)
def test_answer_is_judged_as_a_careful_person_would(response, gold, choices, right):
    assert (
        common.is_correct(common.extract_answer(response), {"answer": gold, "choices": choices})
        is right
    )


def test_the_table_has_many_cases_of_both_kinds():
    assert len(TABLE) >= 80 and 35 <= sum(right for *_, right in TABLE) <= len(TABLE) - 35


def test_equal_answers_count_as_one_vote():
    assert {common.canonical(text, {}) for text in ("7.0", " 7 ", "14/2", "= 7")} == {"7"}
    assert {common.canonical(text, {"choices": AB}) for text in ("(b)", "12", "12 (B)")} == {"B"}
    assert common.canonical("A or B", {"choices": AB}) is None
    assert common.canonical(None, {"choices": AB}) is None
    assert common.canonical("5 m", {}) == "5 m" != common.canonical("5 cm", {})  # two votes
    assert common.canonical("[1, 2.0]", LIST) == "[1, 2]"
    assert common.canonical("3/5", FLOAT1) == "0.6" and common.canonical("-0.04", FLOAT1) == "0.0"


# ---- the rules of the six datasets: response, right? ... under one example each

INTEGER, FLOAT1, FLOAT2, LIST, LETTER = (
    {"choices": None, **kind}
    for kind in (
        {"answer_type": "integer"},
        {"answer_type": "float", "precision": 1},
        {"answer_type": "float", "precision": 2},
        {"answer_type": "list"},
        {
            "answer_type": "letter",
            "question": "What is shown?\nOptions: A: a cat, B: a dog, sitting, C: 1,200 birds, "
            "D: nothing",
        },
    )
)
ANGLES, PERMUTED, SURDS = (
    ["30°", "45°", "60°", "90°"],
    ["(c)", "(a)", "(b)"],
    ["2\\sqrt{3}", "\\frac{1}{2}", "\\sqrt{6}", "12"],
)
SENTENCES = ["The cat sleeps.", "A dog barks.", "Both A and B", "None of the above", "none"]
PARTS = ["B", "C", "D", "A"]  # AI2D: arrows in a diagram
PLANTS = ["E", "F", "G", "H"]  # letters that are no position
NEAR = ["5", "5%", "50", "0.5"]  # two texts that read alike
YES = ["Yes", "No"]

DATASETS = {
    # MathV360K: free answers, hints with integer and decimals, choices, trailing dots
    "mathv360k": [
        (
            {"choices": None, "answer": "Yes"},
            {
                "The answer is Yes.": True,
                "Answer: yes": True,
                "**Answer:** Yes": True,
                "Answer: Yes and No": False,
                "Answer: Not yes": False,
                "yes": False,
                "Answer: Yes\nAnswer: No": False,
                "The answer isn't yes": False,
                'Answer: "Yes"': True,
            },
        ),
        (
            {**INTEGER, "answer": "1,250"},
            {
                "Answer: 1250": True,
                "Answer: 1,250": True,
                "Answer: 1{,}250": True,
                "Answer: 1 250": False,
                "Answer: 1.250": False,
                "Answer: 12,50": False,
                "Answer: $1,250$ apples": True,
                "Answer: 1250.4": False,
                "Answer: 1250 or 1251": False,
            },
        ),
        (
            {**INTEGER, "answer": "-7"},
            {
                "Answer: -7": True,
                "Answer: \u22127": True,
                "Answer: - 7": True,
                "Answer: 7": False,
                "Answer: --7": False,
                "\\boxed{-7.0}": True,
            },
        ),
        (
            {"choices": None, "answer": "1/2"},
            {
                "Answer: 0.5": True,
                "Answer: \\frac{1}{2}": True,
                "Answer: \\frac12": True,
                "Answer: \\dfrac{2}{4}": True,
                "Answer: 1/3": False,
                "Answer: 1\\frac{1}{2}": False,
                "Answer: 50%": False,
                "Answer: 1/2 or 1/3": False,
            },
        ),
        (
            {"choices": None, "answer": "1 1/2"},
            {
                "Answer: 1\\frac{1}{2}": True,
                "Answer: 3/2": True,
                "Answer: 1.5": True,
                "Answer: 11/2": False,
                "Answer: 5.5": False,
            },
        ),
        (
            {"choices": None, "answer": "5 cm"},
            {
                "Answer: 5 cm": True,
                "Answer: 5cm.": True,
                "Answer: 5": True,
                "Answer: 5 m": False,
                "Answer: 5 \\text{ cm}": True,
                "Answer: 5 cm^2": False,
            },
        ),
        (
            {"choices": None, "answer": "24 cm^2"},
            {
                "Answer: 24 cm^2": True,
                "Answer: 24": True,
                "Answer: 24 square cm": False,
                "Answer: 24 cm": False,
            },
        ),
        (
            {"choices": None, "answer": "60"},
            {
                "Answer: 60 km/h": True,
                "Answer: 60 miles per hour": True,
                "Answer: 60 per 2 hours": False,
                "Answer: x = 60": True,
                "Answer: 2x = 60": False,
                "Answer: 60x": False,
                "Answer: 60 million": False,
                "Answer: 60k": False,
                "Answer: 60 and": False,
                "Answer: 60%": True,
                "Answer: 60\\%": True,
            },
        ),
        (
            {"choices": SURDS, "answer": "A"},
            {
                "Answer: (A)": True,
                "Answer: 2\\sqrt{3}": True,
                "Answer: 2 \\sqrt { 3 }": True,
                "Answer: $2\\sqrt{3}$": True,
                "Answer: (A) 2\\sqrt{3}": True,
                "Answer: (A) \\sqrt{6}": False,
                "\\boxed{\\text{A}}": True,
                "\\boxed{2\\sqrt{3}}": True,
                "Answer: (B)": False,
                "Answer: \\sqrt{3}": False,
            },
        ),
        (
            {"choices": ["\\frac { \\sqrt { 3 } } { 2 }", "\\frac{1}{2}"], "answer": "A"},
            {
                "Answer: √3/2": True,
                "Answer: \\frac{\\sqrt{3}}{2}": True,
                "Answer: \\frac{√3}{2}": True,
                "Answer: √3": False,
                "Answer: 0.5": False,
            },
        ),
        (
            {"choices": ANGLES, "answer": "C"},
            {
                "Answer: 60": True,
                "Answer: 60^\\circ": True,
                "Answer: 60^{\\circ}": True,
                "Answer: 60 \\degree": True,
                "Answer: C. 60°": True,
                "Answer: 30": False,
                "Answer: 60 or 90": False,
                "Answer: C or D": False,
                "So it is \\boxed{C}.": True,
                "\\boxed{C} or \\boxed{D}": False,
                "Answer: E": False,
            },
        ),
        (
            {**LETTER, "answer": "C"},
            {"Answer: (c)": True, "Answer: C.": True, "Answer: the third": False, "": False},
        ),
    ],
    # MathVista: text answers become positions, precision is the question's
    "mathvista": [
        (
            {"choices": PERMUTED, "answer": "B"},
            {
                "Answer: B": True,
                "Answer: (b)": True,
                "Answer: (a)": False,
                "Answer: A": False,
                "Answer: (C)": False,
                "Answer: (B) (a)": True,
                "Answer: (B) (c)": False,
            },
        ),
        (
            {"choices": YES, "answer": "A"},
            {
                "Answer: Yes": True,
                "Answer: A": True,
                "Answer: (A) Yes": True,
                "Answer: (A) No": False,
                "Answer: No": False,
                "Answer: ": False,
                "": False,
                "Yes": False,
                "Answer: yes or no": False,
                "Answer: Yes\nAnswer: A": True,
                "Answer: Yes\nAnswer: B": False,
            },
        ),
        (
            {**INTEGER, "answer": "7"},
            {
                "Answer: 7": True,
                "Answer: 7.0": True,
                "Answer: 7.4": False,
                "Answer: 6.9999999": False,
                "Answer: seven": False,
                "Answer: 7 years": True,
                "Answer: 14/2": True,
                "Answer: 7 +- 1": False,
                "Answer: 7e0": False,
                "Answer: " + "7" * 5000: False,
                "Answer: 7" + "0" * 30: False,
            },
        ),
        (
            {**FLOAT1, "answer": "0.6"},
            {
                "Answer: 0.6": True,
                "Answer: 0.58": True,
                "Answer: .6": True,
                "Answer: 3/5": True,
                "Answer: 0.66": False,
                "Answer: 0.5": False,
                "Answer: 60%": False,
                "Answer: 0.6 m": True,
            },
        ),
        (
            {**FLOAT1, "answer": "-0.0"},
            {"Answer: 0": True, "Answer: 0.04": True, "Answer: 0.06": False},
        ),
        (
            {**FLOAT2, "answer": "1.45"},
            {
                "Answer: 1.45": True,
                "Answer: $1.45": True,
                "Answer: \\$1.45": True,
                "Answer: €1.45": True,
                "Answer: 1.449": True,
                "Answer: 1.4": False,
                "Answer: 1.46": False,
                "Answer: 145 cents": False,
                "Answer: 1.45 or 1.50": False,
                "Answer: " + "1." + "4" * 60: False,
            },
        ),
        (
            {**FLOAT2, "answer": "1234.5"},
            {"Answer: 1,234.50": True, "Answer: 1234.5": True, "Answer: 1.234,50": False},
        ),
        (
            {**LIST, "answer": "[2007, 2008]"},
            {
                "Answer: [2007, 2008]": True,
                "Answer: [2007,2008]": True,
                "Answer: 2007, 2008": True,
                "Answer: [2007.0, 2008]": True,
                "Answer: [2008, 2007]": False,
                "Answer: [2007]": False,
                "Answer: 2007 and 2008": False,
                "Answer: [2007, 2008, 2009]": False,
                "Answer: []": False,
                "Answer: [2007, x]": False,
                "\\boxed{[2007, 2008]}": True,
                "Answer: 20072008": False,
            },
        ),
    ],
    # M3CoT: two to five choices, sentences as options
    "m3cot": [
        (
            {"choices": SENTENCES, "answer": "E"},
            {
                "Answer: E": True,
                "Answer: (E)": True,
                "Answer: none": True,
                "Answer: D": False,
                "Answer: None of the above": False,
                "Answer: F": False,
                "Answer: (E) none": True,
                "Answer: [E]": True,
            },
        ),
        (
            {"choices": SENTENCES, "answer": "C"},
            {
                "Answer: Both A and B": True,
                "Answer: A and B": False,
                "Answer: C: Both A and B": True,
                "Answer: A, B": False,
                "The correct option is C": True,
            },
        ),
        (
            {"choices": SENTENCES, "answer": "B"},
            {
                "Answer: A dog barks.": True,
                "Answer: A dog barks": True,
                "Answer: A": False,
                "Answer: a": False,
                "Answer: Option B": True,
                "Answer: option (B)": True,
                "The correct choice is: (B) A dog barks.": True,
                "The answer is B.\n\nSo the answer is (B) A dog barks.": True,
                "The answer is B.\nThe answer is C.": False,
                "Answer: B. The cat sleeps.": False,
                "Answer: B, not A": False,
            },
        ),
    ],
    # MMStar: options inside the question: letters, with their own text or none
    "mmstar": [
        (
            {**LETTER, "answer": "B"},
            {
                "Answer: B": True,
                "Answer: b": True,
                "Answer: (B)": True,
                "Answer: B: a dog, sitting": True,
                "Answer: B: a cat": False,
                "Answer: B: a": False,
                "Answer: a dog, sitting": False,
                "Answer: A": False,
                "Answer: B or C": False,
                "Answer: BC": False,
                "Answer: A: a cat, B: a dog, sitting": False,
                "Answer: **B**": True,
                "Answer: $\\mathrm{B}$": True,
                "B": False,
            },
        ),
        (
            {**LETTER, "answer": "C"},
            {
                "Answer: C: 1200 birds": True,
                "Answer: C: 1,200 birds": True,
                "Answer: C: 1": False,
                "Answer: 1,200 birds": False,
            },
        ),
        (
            {**LETTER, "answer": "D"},
            {"Answer: D: nothing": True, "Answer: D) nothing.": True, "Answer: (D) noth": False},
        ),
    ],
    # MMBench: every rotated copy is judged by its own letters
    "mmbench": [
        (
            {"choices": ["cat", "dog", "cow"], "answer": "C"},
            {
                "Answer: C": True,
                "Answer: cow": True,
                "Answer: A": False,
                "Answer: dog": False,
                "Answer: D": False,
                "Answer: cat and cow": False,
            },
        ),
        (
            {"choices": ["cow", "cat", "dog"], "answer": "A"},
            {
                "Answer: C": False,
                "Answer: cow": True,
                "Answer: A. cow": True,
                "Answer: A. cat": False,
            },
        ),
        (
            {"choices": NEAR, "answer": "B"},
            {"Answer: B": True, "Answer: 5%": False, "Answer: 5": False, "Answer: (B) 5%": True},
        ),
    ],
    # AI2D: option texts that are letters: the position counts
    "ai2d": [
        (
            {"choices": PARTS, "answer": "A"},
            {
                "Answer: A": True,
                "Answer: B": False,
                "Answer: (A) B": True,
                "Answer: (B) C": False,
                "Answer: (A) A": False,
                "Answer: A, B": False,
            },
        ),
        (
            {"choices": PARTS, "answer": "D"},
            {"Answer: D": True, "Answer: A": False, "Answer: D: A": True, "Answer: D: D": False},
        ),
        (
            {"choices": PLANTS, "answer": "B"},
            {
                "Answer: B": True,
                "Answer: F": True,
                "Answer: f": True,
                "Answer: E": False,
                "Answer: (B) F": True,
                "Answer: (B) E": False,
                "Answer: I": False,
            },
        ),
    ],
}
CASES = [
    (name, example, response, right)
    for name, examples in DATASETS.items()
    for example, responses in examples
    for response, right in responses.items()
]


@pytest.mark.parametrize("name, example, response, right", CASES)
def test_each_dataset_is_judged_by_its_own_rules(name, example, response, right):
    assert common.is_correct(common.extract_answer(response, example), example) is right


def test_the_dataset_table_has_at_least_150_cases_of_both_kinds():
    assert len(CASES) >= 150 and 70 <= sum(right for *_, right in CASES) <= len(CASES) - 70


@pytest.mark.parametrize(
    "response, example",
    [
        ("Answer: seven", INTEGER),
        ("Answer: [1, x]", LIST),
        ("Answer: a dog, sitting", LETTER),
        ("Answer: B: a cat", LETTER),
        ("Answer: A or B", {"choices": AB}),
    ],
)
def test_an_answer_that_its_type_cannot_read_counts_as_unparsable(response, example):
    assert common.canonical(common.extract_answer(response, example), example) is None


# With choices or an answer_type, a lead-in that names nothing readable is prose, if a readable
# answer follows.
PROSE = [
    ("So the answer is 3 + 4 = 7.\nAnswer: 7", {**INTEGER, "answer": "7"}, True),
    ("The answer is the sum of the two bars.\nAnswer: 7", {**INTEGER, "answer": "7"}, True),
    ("The answer is in row 3, so \\boxed{7}", {**INTEGER, "answer": "7"}, True),
    ("The answer is in row 3.\nSo it is \\boxed{7}.", {**INTEGER, "answer": "7"}, True),
    ("The answer is what is largest.\nAnswer: B", {"choices": AB, "answer": "B"}, True),
    ("Answer: 7\nSo the answer is the sum.", {**INTEGER, "answer": "7"}, False),
    ("The answer is 8.\nThe answer is the sum.\nAnswer: 7", {**INTEGER, "answer": "7"}, False),
    ("The answer is the sum.\nAnswer: 7", {"choices": None, "answer": "7"}, False),
]


@pytest.mark.parametrize("response, example, right", PROSE)
def test_prose_about_the_answer_does_not_hide_the_answer(response, example, right):
    assert common.is_correct(common.extract_answer(response, example), example) is right


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 7" + " " * 4000 + "x",
        "\\boxed{" * 4000,
        "\\boxed" + "{a" * 4000,
        "Answer: " + "{" * 4000 + "}" * 4000,
        "Answer: " + "7 " * 4000,
        "Answer: 7" + "." * 4000 + "x",
        "Answer: 7 " + "per " * 4000,
        "Answer: [" + "1, " * 4000,
        "Answer: B: " + "a cat " * 4000,
        "correct" + " " * 4000,
        "answer is " * 4000,
        "the correct " * 4000,
        "the" + " " * 4000 + "answer" + "*" * 4000,
        "answer is " * 4000 + "\\boxed{",
        "the answer is " * 4000 + "\\boxed{",
        "Answer:" + "\n" * 4000 + "\\boxed{",
        "Answer: 7" + ", so " * 4000 + "answer",
        "Answer: " + "\\frac{1}{2}" * 4000,
        "Answer: " + "a (" * 4000,
        "Answer: " + "x = " * 4000,
        "Answer: " + "7 cm/" * 4000,
    ],
)
@pytest.mark.parametrize(
    "example",
    [
        {"answer": "9", "choices": None},
        {"answer": "B", "choices": AB},
        {**LIST, "answer": "[9]"},
        {**LETTER, "answer": "B"},
    ],
)
def test_a_response_that_never_comes_to_an_end_is_wrong_and_costs_little_time(text, example):
    start = time.process_time()
    assert not common.is_correct(common.extract_answer(text, example), example)
    assert time.process_time() - start < 2


# ---- what real models wrote and was not read (22,975 outputs), or was read wrongly

FREE = [  # answer, gold answer, right?
    *(
        (form, "7", True)
        for form in ("about 7", "≈ 7", "= 7", "AB = 7", "x = 7", "∠ABC = 7°", "(7)", "[7]", "7€")
    ),
    *(
        (form, "7", True)
        for form in (
            "7 years old",
            "7, because 3 + 4 = 7",
            "7 cm, as 8 is too much",
            "7, so it fits",
        )
    ),
    *(
        (form, "7", False)
        for form in ("7, 8", "7, or 8", "7 or 8", "7 + 1", "2x", "7x", "7 million", "7 hundred")
    ),
    *(
        (form, "7", False)
        for form in (
            "7, so the answer is 8",
            "7, because the answer is 8",
            "7, not 8",
            "(7, 8)",
            "[7, 8]",
        )
    ),
    *(
        (form, "7", False)
        for form in (
            "about 7 or 8",
            "7 to 8",
            "AB = 7 + x",
            "2x = 7",
            "7 is wrong",
            "7 or more",
            "7 of 8",
        )
    ),
    ("7, 8", "8", False),
    ("7, so the answer is 8", "8", False),
    ("50 %", "0.5", False),
    ("0.5", "50 %", False),
    ("5 m", "5 cm", False),
    ("5", "5 cm", True),
    ("5 cm", "5", True),
    ("5 cm²", "5 cm^2", True),
    ("5 cm^{2}", "5 cm^2", True),
    ("5 km / h", "5 km/h", True),
    ("5 years old", "5 miles", False),
    ("7 π", "7", False),
    ("7\\pi", "7π", True),
    ("5*a^2", "5a^2", True),
    ("5 \\cdot a^{2}", "5a^2", True),
    ("5*2", "52", False),
    ("5a^3", "5a^2", False),
    *(
        (form, "2√{3}", True)
        for form in ("2\\sqrt{3}", "2√3", "2*sqrt(3)", "2\\sqrt 3", "2 √ 3", "$2\\sqrt{3}$")
    ),
    *((form, "2√{3}", False) for form in ("√3", "2√2", "23", "2\\sqrt{33}", "2", "3")),
    ("√(3a)", "√3a", False),
    ("(1, 2)", "1, 2", True),
    ("[1, 2)", "(1, 2]", False),
    ("\\frac{a+b}{2}", "a+b/2", False),
    ("2\\frac{1}{3}", "21/3", False),
    ("7, because", "7", False),
    ("because 7", "7", False),
    ("yes, because it is", "yes", False),
    ("1,200", "[1, 200]", False),
]


@pytest.mark.parametrize("answer, gold, right", FREE)
def test_a_free_answer_is_its_value_and_its_unit(answer, gold, right):
    example = {"answer": gold}  # the optional fields may be absent
    assert (
        common.is_correct(common.extract_answer(f"The answer is {answer}", example), example)
        is right
    )


RESPONSES = [  # response, gold answer, choices, the answer taken (None: two that differ)
    ("The answer is 5 m.\nAnswer: 5 cm", "5 cm", None, None),
    ("Answer: 5\nAnswer: 5 m", "5 cm", None, "5 m"),
    ("Answer: 5 m\nAnswer: 5", "5 cm", None, "5 m"),
    ("Answer: 5 m\nAnswer: 5\nAnswer: 5 cm", "5 cm", None, None),
    ("Answer: 5 cm\nAnswer: 5.0 cm", "5 cm", None, "5 cm"),
    ("Answer: 7\n\\boxed{7.0}", "7", None, "7"),
    ("The answer is **B**. No", "B", YES, "**B**. No"),
    ("The answer is x = \\boxed{7}.", "7", None, "7"),
    ("The final answer is\n\\boxed{7}", "7", None, "7"),
    ("Answer: Yes. No.", "A", YES, None),
    ("So the answer is B (no).\nThe answer is A", "B", YES, None),
    ("The answer is B (No).\nB means No", "B", YES, "B (No)."),
    ("The answer is (B) No. There are no dogs.", "B", YES, "(B) No. There are no dogs."),
    ("The answer is B. No.\nAnswer: No", "B", YES, "B. No."),
    ("Answer: A (No)\nAnswer: A", "A", YES, "A"),
]


@pytest.mark.parametrize("response, gold, choices, taken", RESPONSES)
def test_two_final_answers_are_one_only_if_they_agree(response, gold, choices, taken):
    assert common.extract_answer(response, {"answer": gold, "choices": choices}) == taken


CITIES = ["Paris", "Rome", "Oslo", "Tokyo"]
SIDES = ["Same", "Perpendicular", "Opposite", "neither same nor opposite"]
PRODUCTS = ["5*a^2", "a^2", "5*a^3", "2*b"]
UNITS = ["5 m", "5 cm", "10", "2.5"]
REASONS = ["Yes, because it rains", "Yes, because it snows", "No"]
ROOTS = ["\\sqrt{3}", "2\\sqrt{3}", "\\frac{√{3}}{2}", "\\sqrt 2"]
LISTS = [
    YES,
    ANGLES,
    SURDS,
    ROOTS,
    CITIES,
    SIDES,
    PRODUCTS,
    UNITS,
    REASONS,
    NUMBERS,
    SENTENCES,
    ["(3, 4)", "(4, 3)"],
    ["-5", "5", "−10"],
]
FORMS = [  # l: letter, t: the option's text
    "{l}",
    "({l})",
    "[{l}]",
    "{l}.",
    "{l})",
    "({l}) {t}",
    "{l}. {t}",
    "{l}: {t}",
    "{l}) {t}",
    "**{l}**. {t}",
    "Option {l}: {t}",
    "({l}): {t}",
    "{l} ({t})",
    "({l}), {t}",
    "{l}, {t}",
    "{l} - {t}",
    "({l}) - {t}",
    "{l} {t}",
    "{t} ({l})",
    "({l}) {t}. There is more to say.",
    "({l}) {t}, as it is so",
    "{l}, because it is so",
    "{l}, since it is {t}",
    "({l}) whatever this may be",
    "{l}. \\mathrm{{x}}\\ units",
]
LETTER_LIKE = [PARTS, LETTER_TEXTS, PLANTS, ["a", "b", "c", "d"]]
CLEAR = [
    "{l}",
    "({l})",
    "{l}.",
    "({l}) {t}",
    "{l}: {t}",
    "{l}. {t}",
    "{l} ({t})",
]  # "A, B" is two letters
OPTIONS = [
    (choices, index, form)
    for lists, forms in ((LISTS, FORMS), (LETTER_LIKE, CLEAR), ([PERMUTED], CLEAR[:-1]))
    for choices in lists
    for form in forms
    for index in range(len(choices))
]


@pytest.mark.parametrize("choices, index, form", OPTIONS)
def test_every_form_of_an_option_is_that_option_and_no_other(choices, index, form):
    letter, text = common.LETTERS[index], choices[index]
    answer = common.extract_answer(
        "The answer is " + form.format(l=letter, t=text), {"choices": choices}
    )
    assert choice_index(answer, choices) == index
    for gold in common.LETTERS[: len(choices)]:
        assert common.is_correct(answer, {"answer": gold, "choices": choices}) is (gold == letter)


@pytest.mark.parametrize("choices", [choices for choices in LISTS if choices is not UNITS])
def test_the_text_of_an_option_alone_is_that_option(choices):
    assert [choice_index(text, choices) for text in choices] == list(range(len(choices)))


def spellings(text):
    """Other ways to write a root or a product."""
    return {
        text,
        text.replace("\\sqrt 2", "\\sqrt{2}"),
        text.replace("\\sqrt", "√"),
        text.replace("{3}", "3"),
        text.replace("\\sqrt{3}", "sqrt(3)"),
        text.replace("√{3}", "\\sqrt 3"),
        text.replace("*", ""),
        text.replace("*", " \\cdot "),
        f"${text}$",
        f"\\({text}\\)",
    }


@pytest.mark.parametrize("choices", [ROOTS, SURDS, PRODUCTS])
def test_an_option_respelled_is_that_option_with_its_letter_and_without(choices):
    for index, text in enumerate(choices):
        for spelling in spellings(text):
            assert choice_index(spelling, choices) == index, spelling
            assert choice_index(f"{common.LETTERS[index]}, {spelling}", choices) == index, spelling


TWO = [  # l, t: the letter and text of the right option; k, u: of a wrong one
    "{l} or {k}",
    "{l} and {k}",
    "{l}, {k}",
    "({l}), ({k})",
    "({l}) ({k})",
    "({l}) or ({k})",
    "{l}/{k}",
    "{l} {k}",
    "({l}) {u}",
    "{l}. {u}",
    "{l} ({u})",
    "({k}) {t}",
    "{k}: {t}",
    "{k} - {t}",
    "{k}, {t}",
    "{t} ({k})",
    "({l}), {u}",
    "{l}, {u}",
    "{l} {u}",
    "not ({l})",
    "not {l}",
    "{l}, not {k}",
    "neither {l} nor {k}",
    "{t} or {u}",
    "{t} and {u}",
    "{l}: {t}, {k}: {u}",
    "({l}) either {u} or {t}",
    "({l}) {u}, because of it",
    "{l}{k}",
]


@pytest.mark.parametrize("form", TWO)
@pytest.mark.parametrize("choices", [YES, ANGLES, SURDS, CITIES, NUMBERS, PRODUCTS, REASONS])
def test_an_answer_that_names_two_options_or_denies_one_is_right_for_none(choices, form):
    for index, text in enumerate(choices):
        for other, another in enumerate(choices):
            if other != index:
                answer = form.format(
                    l=common.LETTERS[index], t=text, k=common.LETTERS[other], u=another
                )
                assert choice_index(common.extract_answer(f"Answer: {answer}"), choices) is None, (
                    answer
                )


@pytest.mark.parametrize("choices", LETTER_LIKE)
def test_letters_beside_letters_are_two_letters(choices):
    for index, text in enumerate(choices):
        for form in ("{l}, {t}", "{l} - {t}", "{l} {t}", "({l}), ({t})"):
            if (
                text[0].upper() in common.LETTERS[: len(choices)]
                and text.upper() != common.LETTERS[index]
            ):
                assert choice_index(form.format(l=common.LETTERS[index], t=text), choices) is None


@pytest.mark.parametrize(
    "answer, letter",
    [
        *(
            (form, "B")
            for form in (
                "B (a dog, sitting)",
                "(B), a dog, sitting",
                "B, a dog, sitting",
                "B - a dog, sitting",
                "B a dog, sitting",
                "a dog, sitting (B)",
                "(B) A dog, sitting. It sits.",
                "B, because it sits",
            )
        ),
        *((form, "C") for form in ("C (1200 birds)", "1,200 birds (C)", "C - 1,200 birds")),
        *(
            (form, None)
            for form in (
                "B (a cat)",
                "a cat (B)",
                "B, a",
                "B a",
                "A: a cat, B: a dog, sitting",
                "B, C",
                "B or C",
                "(B) bird",
                "nothing",
            )
        ),
    ],
)
def test_options_in_the_question_are_named_by_their_letter(answer, letter):
    assert common.canonical(answer, LETTER) == letter


def test_the_canonical_text_of_an_answer_reads_as_the_answer():
    judged = [
        (common.extract_answer(response), {"answer": gold, "choices": choices})
        for response, gold, choices, _ in TABLE
    ]
    judged += [
        (common.extract_answer(response, example), example) for _, example, response, _ in CASES
    ]
    judged += [(answer, {"answer": gold}) for answer, gold, _ in FREE]
    judged += [
        (
            form.format(l=common.LETTERS[index], t=choices[index]),
            {"answer": "A", "choices": choices},
        )
        for choices, index, form in OPTIONS
    ]
    for answer, example in judged:
        text = common.canonical(answer, example)
        assert common.canonical(text, example) == text, answer
        assert common.is_correct(text, example) is common.is_correct(answer, example), answer


def test_the_readings_of_the_table_are_single_spaced_and_stable():
    for answer, gold, _ in FREE:
        for text in (answer, gold):
            assert (
                common.plain(common.plain(text))
                == common.plain(text)
                == " ".join(common.plain(text).split())
            )
