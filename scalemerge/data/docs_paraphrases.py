"""Pairs of sentences by different authors about the same operation: functions of one name in two libraries.

`numpy.cumsum` and `torch.cumsum` are described by people who never met, so their summaries are paraphrases found
without any annotator. The name alone is weak evidence, though: `run`, `get` and `parse` mean something else in every
library. A pair is kept if the name is not such a word and is rare enough, and if the two sentences share at least one
content word; sentences that are nearly equal word for word (one library copying the other) teach nothing and are
dropped.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from scalemerge.data.docs_mining import Documented

_GENERIC = """
add all any apply args array as base bind build call check clear clone close code compile config connect context
convert copy create data default delete device dict dim dims display doit dtype dump emit end error eval evaluate
execute exit extend extract feed fields file fill find finish flags flush format forward from func generate get group
handle handler has head init input insert is items iter join key keys kind kwargs label level line list load loads
main make map match method methods mode module name names new next node nodes num open options order output param
parameters parse path pop position post prepare print process put query raw read register release remove render repr
request reset resolve result results root rule run save scan send set setup shape show size sort source start state
status step steps stop str string style symbols tag test text tick title to token transform type types update url use
validate value values version visit visitname walk warn word wrap write writer
"""
GENERIC_NAMES = frozenset(_GENERIC.split())
_STOP = """
a an the of to in on by for from and or as is are be it its this that these those with at if not no into which when
given return returns returned get gets set sets compute computes calculate create creates make value values object
objects instance class function method one each all any new self other same used using use uses whether can has have
will input inputs output
"""
STOP_WORDS = frozenset(_STOP.split())
MAX_LIBRARIES_WITH_NAME = 6
MAX_PAIRS_A_NAME = 6
MAX_USES_OF_A_TEXT = 3
MIN_SIMILARITY, MAX_SIMILARITY = 0.12, 0.8


@dataclass(frozen=True)
class Sentence:
    """A summary with what the pairing looks at. `stems` are content words cut to six letters."""

    library: str
    name: str
    text: str
    stems: frozenset[str]

    @classmethod
    def of(cls, entry: Documented) -> Sentence:
        return cls(entry.library, entry.name.replace("_", "").lower(), entry.summary, content_stems(entry.summary))


def content_stems(text: str) -> frozenset[str]:
    """The content words of a text, cut to six letters so that `sorted` meets `sorting` half-way."""
    words = re.findall(r"[a-z]{2,}", text.lower())
    return frozenset(word.rstrip("s")[:6] for word in words if word not in STOP_WORDS)


def similarity(left: Sentence, right: Sentence) -> float:
    """Jaccard similarity of the content words."""
    union = len(left.stems | right.stems)
    return len(left.stems & right.stems) / union if union else 0.0


def distinct_sentences(entries: Iterable[Documented]) -> list[Sentence]:
    """The public, named, non-trivial summaries; one for each library, name and text."""
    sentences = (Sentence.of(entry) for entry in entries if entry.is_public and not entry.name.isupper())
    return list({(s.library, s.name, s.text.lower()): s for s in sentences if s.stems}.values())


def same_name_pairs(sentences: Sequence[Sentence]) -> list[tuple[Sentence, Sentence]]:
    """Pairs of different libraries under one name, the most similar of a name first, in a fixed order."""
    by_name: dict[str, dict[str, list[Sentence]]] = defaultdict(lambda: defaultdict(list))
    for sentence in sentences:
        by_name[sentence.name][sentence.library].append(sentence)
    pairs: list[tuple[Sentence, Sentence]] = []
    seen: set[tuple[str, str]] = set()
    uses: Counter[str] = Counter()
    for name in sorted(by_name):
        libraries = by_name[name]
        if len(name) < 3 or name in GENERIC_NAMES or not 2 <= len(libraries) <= MAX_LIBRARIES_WITH_NAME:
            continue
        candidates = [
            (-similarity(left, right), left.text, right.text, left, right)
            for first, second in combinations(sorted(libraries), 2)
            for left in libraries[first]
            for right in libraries[second]
            if MIN_SIMILARITY <= similarity(left, right) < MAX_SIMILARITY
        ]
        kept = 0
        for _, _, _, left, right in sorted(candidates, key=lambda row: row[:3]):
            fresh = (left.text, right.text) not in seen and max(uses[left.text], uses[right.text]) < MAX_USES_OF_A_TEXT
            if fresh and kept < MAX_PAIRS_A_NAME:
                seen.update([(left.text, right.text), (right.text, left.text)])
                uses.update((left.text, right.text))
                pairs.append((left, right))
                kept += 1
    return pairs


def hard_negatives(
    pairs: Sequence[tuple[Sentence, Sentence]], sentences: Sequence[Sentence]
) -> list[tuple[Sentence, Sentence, Sentence]]:
    """(left, right, negative) for each pair that has a negative: a look-alike of `left` in the library of `right`.

    The look-alike is the lexically most similar sentence of another name that is not itself a near copy, so that words
    in common do not give the answer away. Names that contain one another (`sum`, `nansum`) may well mean the same and
    are avoided, as is any sentence that is a positive of `left` elsewhere.
    """
    by_library: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in sorted(sentences, key=lambda s: (s.library, s.name, s.text)):
        by_library[sentence.library].append(sentence)
    taken = {(left.text, right.text) for left, right in pairs} | {(right.text, left.text) for left, right in pairs}
    uses: Counter[str] = Counter()
    triplets = []
    for left, right in pairs:
        best, best_similarity = None, 0.0
        for candidate in by_library[right.library]:
            if left.name in candidate.name or candidate.name in left.name or uses[candidate.text] >= 2:
                continue
            score = similarity(left, candidate)
            if best_similarity < score < 0.6 and (left.text, candidate.text) not in taken:
                best, best_similarity = candidate, score
        if best is not None:
            uses[best.text] += 1
            taken.update([(left.text, best.text), (best.text, left.text)])
            triplets.append((left, right, best))
    return triplets
