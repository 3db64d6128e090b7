"""VQA accuracy, with the answer normalisation of its official evaluation.

Antol et al., "VQA: Visual Question Answering" (arXiv:1505.00468) and Goyal et al. (VQAv2, arXiv:1612.00837): ten people answered each
question; an answer scores min(1, how many of the other nine gave it / 3), averaged over leaving each of the ten out.
https://visualqa.org/evaluation.html: lower case, number words as digits, no articles, apostrophes in contractions, no punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_WITHOUT = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've isn't it'd it'll
let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't she's should've shouldn't somebody'd
somebody'll somebody's someone'd someone'll someone's something'd something'll that'd that's there'd there're there's they'd they'll
they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll
why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITHOUT.split()}


def normalize_vqa(answer: str) -> str:
    """An answer as the official evaluation compares it."""
    given = text = answer.replace("\n", " ").replace("\t", " ").strip()
    number = _COMMA_IN_NUMBER.search(given) is not None
    for mark in _PUNCTUATION:
        # A mark that touches a space somewhere, and any mark of a text with a number such as 1,000, goes; else it becomes a space.
        touches = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if touches or number else " ")
    text = _PERIOD.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The score of one answer, from 0 to 1.

    Args:
        people: what each person answered, usually ten.
    """
    given = [normalize_vqa(person) for person in people]
    said = normalize_vqa(answer)
    scores = [min(1.0, sum(said == other for j, other in enumerate(given) if j != i) / 3) for i in range(len(given))]
    return sum(scores) / max(len(scores), 1)
