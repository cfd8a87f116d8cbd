# SPDX-License-Identifier: Apache-2.0
"""Breaks the kernels' ordering on purpose, one line at a time.

Every line marked ``// ORDER:`` gives mutants: the statement deleted, and each ordered call in it
weakened (release to relaxed, system to device scope, ...). Twins are further faults, written out
as a replacement. All of them are compiled into one program, as
``deepcomm_mutant(N) ? broken : right``, and chosen by ``--mutant N``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from emulated.build import BUILD, CSRC, Variant, digest

# The emulated path: what kernels run here, less the two implementations of the primitives.
MUTATED = ("device/*.cuh", "kernels/**/*.cuh")
# Whose kernels need the backend to run them; test_mutants.py attacks the others.
HIGH_THROUGHPUT = tuple(
    f"kernels/{name}/" for name in ("combine", "dispatch", "meet", "rail", "rows")
)
LOW_LATENCY = "kernels/low_latency/"
MARKER = re.compile(r"(?<!/)// ORDER: (.*)")
VALUE = re.compile(r"(?:const )?(?!bool\b|return\b)\w+ \w+ = ")

WEAKER: dict[str, tuple[str, ...]] = {
    "red_add_release_sys": ("red_add_relaxed_sys", "red_add_release_gpu"),
    "red_add_release_gpu": ("red_add_relaxed_gpu",),
    "st_release_sys": ("st_relaxed_sys", "st_release_gpu"),
    "ld_acquire_sys": ("ld_relaxed_sys", "ld_acquire_gpu"),
    "ld_acquire_gpu": ("ld_relaxed_gpu",),
    "st_release_gpu": ("st_relaxed_gpu", "st_release_block"),
    "wait_reached_acquire_sys": ("wait_reached_relaxed_sys", "wait_reached_acquire_gpu"),
    "wait_reached_acquire_gpu": ("wait_reached_relaxed_sys",),
    "atom_add_acq_rel_gpu": ("atom_add_acquire_gpu", "atom_add_release_gpu"),
    "fence_sc_sys": ("fence_acq_rel_sys", "fence_sc_gpu"),
    "bulk_wait_group<0>": ("bulk_wait_group_read<0>", "bulk_wait_group<1>"),
    "bulk_wait_group_read<1>": ("bulk_wait_group_read<2>",),
}


@dataclass(frozen=True)
class Twin:
    """A broken version of a protocol that no ORDER line gives.

    In ``find``, which occurs once in the file, the expression ``part`` becomes ``replace``.
    """

    name: str
    case: str
    path: str
    find: str
    part: str
    replace: str
    program: str = "probes"


@dataclass(frozen=True)
class Mutant:
    """One way to break one line."""

    number: int
    path: str
    line: int
    change: str
    note: str
    """What the marker says, on its first line."""

    @property
    def name(self) -> str:
        """Stable name for tables: independent of line numbers and twins."""
        return f"{self.path}: {self.note}: {self.change}"


@dataclass
class Mutator:
    """Rewrites one file so that each of its mutants can be switched on."""

    path: str
    text: str
    next_number: int
    mutants: list[Mutant]

    def mark_twins(self, twins: list[Twin]) -> None:
        """Enclose each twin's part in comments, so that mutants of it stay apart from the twin."""
        for twin in twins:
            if self.text.count(twin.find) != 1:
                raise ValueError(f"twin {twin.name}: {twin.find!r} must occur once in {self.path}")
            number = self.add(self.text.index(twin.find), twin.name, "twin")
            begin, _, end = twin.find.rpartition(twin.part)
            marked = f"{begin}/*twin {number}*/{twin.part}/*end {number}*/{end}"
            self.text = self.text.replace(twin.find, marked)

    def insert_twins(self, twins: list[Twin]) -> None:
        for twin in twins:
            number = next(one.number for one in self.mutants if one.change == twin.name)
            marked = re.compile(rf"/\*twin {number}\*/(.*?)/\*end {number}\*/", re.DOTALL)
            choice = rf"(deepcomm_mutant({number}) ? ({twin.replace}) : (\1))"
            self.text = marked.sub(choice, self.text)  # weakened calls repeat their arguments

    def apply_markers(self) -> None:
        position = 0
        while marker := MARKER.search(self.text, position):
            begin, end = statement_of_marker(self.text, marker.start())
            broken = self.break_statement(begin, self.text[begin:end], marker[1])
            self.text = self.text[:begin] + broken + self.text[end:]
            position = max(begin + len(broken), marker.start() + 1)
            line_end = self.text.find("\n", position)
            position = len(self.text) if line_end < 0 else line_end

    def break_statement(self, begin: int, statement: str, note: str) -> str:
        weakened = statement
        for call, weaker_calls in WEAKER.items():
            span = find_call(statement, call)
            if span is None:
                continue
            original = statement[span[0] : span[1]]
            choice = original
            for weaker in weaker_calls:
                number = self.add(begin, f"{call} -> {weaker}", note)
                broken = original.replace(call, weaker, 1)
                choice = f"deepcomm_mutant({number}) ? {broken} : {choice}"
            weakened = weakened.replace(original, f"({choice})", 1)
        if VALUE.match(statement):  # others need the name that it declares
            if weakened == statement:
                raise ValueError(f"nothing to weaken: {statement}")
            return weakened
        number = self.add(begin, "delete", note)
        return delete(weakened, statement, number)

    def add(self, position: int, change: str, note: str) -> int:
        line = self.text.count("\n", 0, position) + 1
        self.mutants.append(Mutant(self.next_number, self.path, line, change, note))
        self.next_number += 1
        return self.next_number - 1


def marked_files(folder: str) -> dict[str, set[str]]:
    """Return the files of a folder that have marked lines, and what their markers say."""
    texts = {
        str(path.relative_to(CSRC)): path.read_text()
        for path in sorted((CSRC / folder).glob("*.cuh"))
    }
    notes = {path: set(MARKER.findall(text)) for path, text in texts.items()}
    return {path: found for path, found in notes.items() if found}


def statement_of_marker(text: str, marker: int) -> tuple[int, int]:
    """Range of the statement that a marker belongs to: before it on its line, or after it."""
    line_begin = text.rfind("\n", 0, marker) + 1
    if text[line_begin:marker].strip():
        before = text[:line_begin].rstrip().rsplit("\n", 1)[-1]
        if "//" not in before and before[-1] not in ";{}":
            raise ValueError(f"a marker must trail a whole statement: {text[line_begin:marker]}")
        begin = line_begin + len(text[line_begin:marker]) - len(text[line_begin:marker].lstrip())
        return begin, line_begin + len(text[line_begin:marker].rstrip())
    begin = marker
    while text[begin:].lstrip().startswith("//"):
        begin = text.index("\n", begin + len(text[begin:]) - len(text[begin:].lstrip())) + 1
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    depth = 0
    for end in range(begin, len(text)):
        depth += (text[end] in "({[") - (text[end] in ")}]")
        if text[end] == ";" and depth == 0:
            return begin, end + 1
    raise ValueError(f"no statement after the marker at {marker}")


def find_call(text: str, name: str) -> tuple[int, int] | None:
    """Range of a call with its qualification and arguments."""
    found = re.search(r"(?:\w+::)*\b" + re.escape(name) + r"(?=\()", text)
    if not found:
        return None
    depth = 0
    for end in range(found.end(), len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if depth == 0:
            return found.start(), end + 1
    raise ValueError(f"unbalanced call of {name}: {text}")


def delete(weakened: str, original: str, number: int) -> str:
    """Make the statement disappear when the mutant is on; waits then succeed at once."""
    declared = re.match(r"((?:const )?bool \w+) = (.*);$", weakened, re.DOTALL)
    if declared:
        return f"{declared[1]} = deepcomm_mutant({number}) || ({declared[2]});"
    returned = re.match(r"return (.*);$", weakened, re.DOTALL)
    if returned:
        flag = re.search(r"sync_and\((\w+)\);$", original)
        instead = flag[1] if flag else "true"
        return f"return deepcomm_mutant({number}) ? {instead} : ({returned[1]});"
    return f"if (!deepcomm_mutant({number})) {{ {weakened} }}"


def mutate(twins: list[Twin]) -> tuple[Variant, list[Mutant]]:
    """Write the mutated sources; return how to build with them, and their mutants."""
    mutants: list[Mutant] = []
    files: dict[str, str] = {}
    for path in sorted({path for pattern in MUTATED for path in CSRC.glob(pattern)}):
        name = str(path.relative_to(CSRC))
        mutator = Mutator(name, path.read_text(), len(mutants) + 1, mutants)
        twins_here = [twin for twin in twins if twin.path == name]
        mutator.mark_twins(twins_here)
        mutator.apply_markers()
        mutator.insert_twins(twins_here)
        files[name] = mutator.text.replace(
            "#pragma once\n", "#pragma once\nbool deepcomm_mutant(int);\n", 1
        )
    folder = BUILD / f"mutated-{digest(list(files.values()))}"
    for name, text in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return Variant(includes=(folder, CSRC), name="mutated"), mutants
