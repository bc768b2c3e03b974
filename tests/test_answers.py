"""Answer extraction and checking against a hand-made table: it fails closed, letters are positions, numbers are exact."""

import time

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
    ("Answer: 7 millions", "7", None, False), ("Answer: 7 bn", "7", None, False), ("Answer: 7 squared", "7", None, False), ("Answer: 3 quarters", "3", None, False),
    ("Answer: 7 halves", "7", None, False), ("Answer: 7 of", "7", None, False), ("Answer: 2a", "2", None, False), ("Answer: 2", "2a", None, False), ("Answer: 2n", "2", None, False),
    ("Answer: 5 am", "5 pm", None, False), ("Answer: 7 g", "7", None, True), ("Answer: 7 times", "7", None, True), ("Answer: 7 people", "7", None, True),
    # Markdown and lead-ins
    ("**Answer:**\n7", "7", None, True), ("**Answer:**\n\nB", "B", AB, True), ("**Final Answer:** 7", "7", None, True), ("Answer: The answer is 7.", "7", None, True),
    ("**Answer:** The correct answer is B.", "B", AB, True), ("**Answer:**\nB\nThe answer is B.", "B", AB, True), ("Answer: 7, for the answer is 8", "8", None, False),
    ("Answer: **B**. 12", "B", AB, True), ("Answer: **B**: 12", "B", AB, True), ("**Answer: 7.**", "7", None, True), ("**Answer:** **7**", "7", None, True), ("**Answer:**", "7", None, False),
    # words
    ("Answer: Paris", "paris", None, True), ("Answer:  New   York ", "new york", None, True), ("Answer: \\text{yes}", "Yes", None, True),
    ("Answer: no", "yes", None, False), ("Answer: not yes", "yes", None, False), ("The answer is yes, because it is", "yes", None, False),
    # multiple choice: a letter is a position
    ("Answer : B", "B", AB, True), ("Answer : b", "B", AB, True), ("Answer: (B)", "B", AB, True), ("Answer: B.", "B", AB, True), ("Answer: B)", "B", AB, True),
    ("Answer: (B) 12", "B", AB, True), ("Answer: B: 12", "B", AB, True), ("Answer: 12", "B", AB, True), ("Answer: B", "12", AB, True), ("Answer: 12.", "12", AB, True),
    ("Answer: A", "B", AB, False), ("Answer: 9", "B", AB, False), ("Answer: (B) 9", "B", AB, False), ("Answer: A or B", "B", AB, False),
    ("Answer: B. 12.0", "B", AB, True), ("Answer: (B) 12 degrees", "B", AB, True), ("Answer: (B) 12.5", "B", AB, False), ("Answer: 12.0", "B", AB, True), ("Answer: 12 apples", "B", AB, True),
    ("Answer: (B) 5 m", "B", ["5 m", "5 cm"], False), ("Answer: 5", "B", ["5 m", "5 cm"], False), ("Answer: 0.5", "A", ["1/2", "0.50"], False),
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


# ---- the rules of the six datasets: response, right? ... under one example each

INTEGER, FLOAT1, FLOAT2, LIST, LETTER = ({"choices": None, **kind} for kind in (
    {"answer_type": "integer"}, {"answer_type": "float", "precision": 1}, {"answer_type": "float", "precision": 2}, {"answer_type": "list"},
    {"answer_type": "letter", "question": "What is shown?\nOptions: A: a cat, B: a dog, sitting, C: 1,200 birds, D: nothing"}))
ANGLES, PERMUTED, SURDS = ["30°", "45°", "60°", "90°"], ["(c)", "(a)", "(b)"], ["2\\sqrt{3}", "\\frac{1}{2}", "\\sqrt{6}", "12"]
SENTENCES = ["The cat sleeps.", "A dog barks.", "Both A and B", "None of the above", "none"]
PARTS = ["B", "C", "D", "A"]          # AI2D: arrows in a diagram
PLANTS = ["E", "F", "G", "H"]         # letters that are no position
NEAR = ["5", "5%", "50", "0.5"]       # two texts that read alike
YES = ["Yes", "No"]

DATASETS = {
    # MathV360K: free answers, hints with integer and decimals, choices, trailing dots
    "mathv360k": [
        ({"choices": None, "answer": "Yes"}, {"The answer is Yes.": True, "Answer: yes": True, "**Answer:** Yes": True, "Answer: Yes and No": False, "Answer: Not yes": False,
                                              "yes": False, "Answer: Yes\nAnswer: No": False, "The answer isn't yes": False, "Answer: \"Yes\"": True}),
        ({**INTEGER, "answer": "1,250"}, {"Answer: 1250": True, "Answer: 1,250": True, "Answer: 1{,}250": True, "Answer: 1 250": False, "Answer: 1.250": False,
                                          "Answer: 12,50": False, "Answer: $1,250$ apples": True, "Answer: 1250.4": False, "Answer: 1250 or 1251": False}),
        ({**INTEGER, "answer": "-7"}, {"Answer: -7": True, "Answer: \u22127": True, "Answer: - 7": True, "Answer: 7": False, "Answer: --7": False, "\\boxed{-7.0}": True}),
        ({"choices": None, "answer": "1/2"}, {"Answer: 0.5": True, "Answer: \\frac{1}{2}": True, "Answer: \\frac12": True, "Answer: \\dfrac{2}{4}": True, "Answer: 1/3": False,
                                              "Answer: 1\\frac{1}{2}": False, "Answer: 50%": False, "Answer: 1/2 or 1/3": False}),
        ({"choices": None, "answer": "1 1/2"}, {"Answer: 1\\frac{1}{2}": True, "Answer: 3/2": True, "Answer: 1.5": True, "Answer: 11/2": False, "Answer: 5.5": False}),
        ({"choices": None, "answer": "5 cm"}, {"Answer: 5 cm": True, "Answer: 5cm.": True, "Answer: 5": True, "Answer: 5 m": False, "Answer: 5 \\text{ cm}": True, "Answer: 5 cm^2": False}),
        ({"choices": None, "answer": "24 cm^2"}, {"Answer: 24 cm^2": True, "Answer: 24": True, "Answer: 24 square cm": False, "Answer: 24 cm": False}),
        ({"choices": None, "answer": "60"}, {"Answer: 60 km/h": True, "Answer: 60 miles per hour": True, "Answer: 60 per 2 hours": False, "Answer: x = 60": True, "Answer: 2x = 60": False,
                                             "Answer: 60x": False, "Answer: 60 million": False, "Answer: 60k": False, "Answer: 60 and": False, "Answer: 60%": True, "Answer: 60\\%": True}),
        ({"choices": SURDS, "answer": "A"}, {"Answer: (A)": True, "Answer: 2\\sqrt{3}": True, "Answer: 2 \\sqrt { 3 }": True, "Answer: $2\\sqrt{3}$": True, "Answer: (A) 2\\sqrt{3}": True,
                                             "Answer: (A) \\sqrt{6}": False, "\\boxed{\\text{A}}": True, "\\boxed{2\\sqrt{3}}": True, "Answer: (B)": False, "Answer: \\sqrt{3}": False}),
        ({"choices": ["\\frac { \\sqrt { 3 } } { 2 }", "\\frac{1}{2}"], "answer": "A"}, {"Answer: √3/2": True, "Answer: \\frac{\\sqrt{3}}{2}": True, "Answer: \\frac{√3}{2}": True, "Answer: √3": False, "Answer: 0.5": False}),
        ({"choices": ANGLES, "answer": "C"}, {"Answer: 60": True, "Answer: 60^\\circ": True, "Answer: 60^{\\circ}": True, "Answer: 60 \\degree": True, "Answer: C. 60°": True, "Answer: 30": False,
                                              "Answer: 60 or 90": False, "Answer: C or D": False, "So it is \\boxed{C}.": True, "\\boxed{C} or \\boxed{D}": False, "Answer: E": False}),
        ({**LETTER, "answer": "C"}, {"Answer: (c)": True, "Answer: C.": True, "Answer: the third": False, "": False})],
    # MathVista: text answers become positions, precision is the question's
    "mathvista": [
        ({"choices": PERMUTED, "answer": "B"}, {"Answer: B": True, "Answer: (b)": True, "Answer: (a)": False, "Answer: A": False, "Answer: (C)": False, "Answer: (B) (a)": True, "Answer: (B) (c)": False}),
        ({"choices": YES, "answer": "A"}, {"Answer: Yes": True, "Answer: A": True, "Answer: (A) Yes": True, "Answer: (A) No": False, "Answer: No": False, "Answer: ": False, "": False, "Yes": False,
                                           "Answer: yes or no": False, "Answer: Yes\nAnswer: A": True, "Answer: Yes\nAnswer: B": False}),
        ({**INTEGER, "answer": "7"}, {"Answer: 7": True, "Answer: 7.0": True, "Answer: 7.4": False, "Answer: 6.9999999": False, "Answer: seven": False, "Answer: 7 years": True, "Answer: 14/2": True,
                                      "Answer: 7 +- 1": False, "Answer: 7e0": False, "Answer: " + "7" * 5000: False, "Answer: 7" + "0" * 30: False}),
        ({**FLOAT1, "answer": "0.6"}, {"Answer: 0.6": True, "Answer: 0.58": True, "Answer: .6": True, "Answer: 3/5": True, "Answer: 0.66": False, "Answer: 0.5": False, "Answer: 60%": False, "Answer: 0.6 m": True}),
        ({**FLOAT1, "answer": "-0.0"}, {"Answer: 0": True, "Answer: 0.04": True, "Answer: 0.06": False}),
        ({**FLOAT2, "answer": "1.45"}, {"Answer: 1.45": True, "Answer: $1.45": True, "Answer: \\$1.45": True, "Answer: €1.45": True, "Answer: 1.449": True, "Answer: 1.4": False, "Answer: 1.46": False, "Answer: 145 cents": False,
                                        "Answer: 1.45 or 1.50": False, "Answer: " + "1." + "4" * 60: False}),
        ({**FLOAT2, "answer": "1234.5"}, {"Answer: 1,234.50": True, "Answer: 1234.5": True, "Answer: 1.234,50": False}),
        ({**LIST, "answer": "[2007, 2008]"}, {"Answer: [2007, 2008]": True, "Answer: [2007,2008]": True, "Answer: 2007, 2008": True, "Answer: [2007.0, 2008]": True, "Answer: [2008, 2007]": False, "Answer: [2007]": False,
                                              "Answer: 2007 and 2008": False, "Answer: [2007, 2008, 2009]": False, "Answer: []": False, "Answer: [2007, x]": False, "\\boxed{[2007, 2008]}": True, "Answer: 20072008": False})],
    # M3CoT: two to five choices, sentences as options
    "m3cot": [
        ({"choices": SENTENCES, "answer": "E"}, {"Answer: E": True, "Answer: (E)": True, "Answer: none": True, "Answer: D": False, "Answer: None of the above": False, "Answer: F": False, "Answer: (E) none": True, "Answer: [E]": True}),
        ({"choices": SENTENCES, "answer": "C"}, {"Answer: Both A and B": True, "Answer: A and B": False, "Answer: C: Both A and B": True, "Answer: A, B": False, "The correct option is C": True}),
        ({"choices": SENTENCES, "answer": "B"}, {"Answer: A dog barks.": True, "Answer: A dog barks": True, "Answer: A": False, "Answer: a": False, "Answer: Option B": True, "Answer: option (B)": True, "The correct choice is: (B) A dog barks.": True,
                                                 "The answer is B.\n\nSo the answer is (B) A dog barks.": True, "The answer is B.\nThe answer is C.": False, "Answer: B. The cat sleeps.": False, "Answer: B, not A": False})],
    # MMStar: options inside the question: letters, with their own text or none
    "mmstar": [
        ({**LETTER, "answer": "B"}, {"Answer: B": True, "Answer: b": True, "Answer: (B)": True, "Answer: B: a dog, sitting": True, "Answer: B: a cat": False, "Answer: B: a": False, "Answer: a dog, sitting": False, "Answer: A": False, "Answer: B or C": False,
                                     "Answer: BC": False, "Answer: A: a cat, B: a dog, sitting": False, "Answer: **B**": True, "Answer: $\\mathrm{B}$": True, "B": False}),
        ({**LETTER, "answer": "C"}, {"Answer: C: 1200 birds": True, "Answer: C: 1,200 birds": True, "Answer: C: 1": False, "Answer: 1,200 birds": False}),
        ({**LETTER, "answer": "D"}, {"Answer: D: nothing": True, "Answer: D) nothing.": True, "Answer: (D) noth": False})],
    # MMBench: every rotated copy is judged by its own letters
    "mmbench": [
        ({"choices": ["cat", "dog", "cow"], "answer": "C"}, {"Answer: C": True, "Answer: cow": True, "Answer: A": False, "Answer: dog": False, "Answer: D": False, "Answer: cat and cow": False}),
        ({"choices": ["cow", "cat", "dog"], "answer": "A"}, {"Answer: C": False, "Answer: cow": True, "Answer: A. cow": True, "Answer: A. cat": False}),
        ({"choices": NEAR, "answer": "B"}, {"Answer: B": True, "Answer: 5%": False, "Answer: 5": False, "Answer: (B) 5%": True})],
    # AI2D: option texts that are letters: the position counts
    "ai2d": [
        ({"choices": PARTS, "answer": "A"}, {"Answer: A": True, "Answer: B": False, "Answer: (A) B": True, "Answer: (B) C": False, "Answer: (A) A": False, "Answer: A, B": False}),
        ({"choices": PARTS, "answer": "D"}, {"Answer: D": True, "Answer: A": False, "Answer: D: A": True, "Answer: D: D": False}),
        ({"choices": PLANTS, "answer": "B"}, {"Answer: B": True, "Answer: F": True, "Answer: f": True, "Answer: E": False, "Answer: (B) F": True, "Answer: (B) E": False, "Answer: I": False})],
}
CASES = [(name, example, response, right) for name, examples in DATASETS.items() for example, responses in examples for response, right in responses.items()]


@pytest.mark.parametrize("name, example, response, right", CASES)
def test_each_dataset_is_judged_by_its_own_rules(name, example, response, right):
    assert common.is_correct(common.extract_answer(response, example), example) is right


def test_the_dataset_table_has_at_least_150_cases_of_both_kinds():
    assert len(CASES) >= 150 and 70 <= sum(right for *_, right in CASES) <= len(CASES) - 70


@pytest.mark.parametrize("response, example", [("Answer: seven", INTEGER), ("Answer: [1, x]", LIST), ("Answer: a dog, sitting", LETTER), ("Answer: B: a cat", LETTER), ("Answer: A or B", {"choices": AB})])
def test_an_answer_that_its_type_cannot_read_counts_as_unparsable(response, example):
    assert common.canonical(common.extract_answer(response, example), example["choices"], example) is None


PROSE = [  # with choices or an answer_type, a lead-in that names nothing readable is prose, if a readable answer follows
    ("So the answer is 3 + 4 = 7.\nAnswer: 7", {**INTEGER, "answer": "7"}, True), ("The answer is the sum of the two bars.\nAnswer: 7", {**INTEGER, "answer": "7"}, True),
    ("The answer is in row 3, so \\boxed{7}", {**INTEGER, "answer": "7"}, True), ("The answer is in row 3.\nSo it is \\boxed{7}.", {**INTEGER, "answer": "7"}, True),
    ("The answer is what is largest.\nAnswer: B", {"choices": AB, "answer": "B"}, True), ("Answer: 7\nSo the answer is the sum.", {**INTEGER, "answer": "7"}, False),
    ("The answer is 8.\nThe answer is the sum.\nAnswer: 7", {**INTEGER, "answer": "7"}, False), ("The answer is the sum.\nAnswer: 7", {"choices": None, "answer": "7"}, False)]


@pytest.mark.parametrize("response, example, right", PROSE)
def test_prose_about_the_answer_does_not_hide_the_answer(response, example, right):
    assert common.is_correct(common.extract_answer(response, example), example) is right


@pytest.mark.parametrize("text", ["Answer: 7" + " " * 4000 + "x", "\\boxed{" * 4000, "\\boxed" + "{a" * 4000, "Answer: " + "{" * 4000 + "}" * 4000, "Answer: " + "7 " * 4000, "Answer: 7" + "." * 4000 + "x",
                                  "Answer: 7 " + "per " * 4000, "Answer: [" + "1, " * 4000, "Answer: B: " + "a cat " * 4000, "correct" + " " * 4000, "answer is " * 4000, "the correct " * 4000, "the" + " " * 4000 + "answer" + "*" * 4000])
@pytest.mark.parametrize("example", [{"answer": "9", "choices": None}, {"answer": "B", "choices": AB}, {**LIST, "answer": "[9]"}, {**LETTER, "answer": "B"}])
def test_a_response_that_never_comes_to_an_end_is_wrong_and_costs_little_time(text, example):
    start = time.process_time()
    assert not common.is_correct(common.extract_answer(text, example), example) and time.process_time() - start < 2
