"""The text of docs/reliability.md, from what an attack found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attack_stops import FORMS, Counts

from weaver.report.tables import markdown_table

if TYPE_CHECKING:
    from attack import Found


def document(found: Found, minutes: float) -> str:
    """The whole page."""
    wrong = "".join(f"- {line}\n" for line in found.wrong) or "Nothing.\n"
    return f"""# Reliability

`make attack` makes this page: it attacks weaver on a Llama of four layers with random weights and
counts. Inputs and moments come from seeds, so that each can be repeated. This page is of a run of
{minutes:.1f} minutes.

## Malformed inputs

One file of a whole set is changed: values of other types and sizes, nesting, cut off and flipped
bytes. *Refused* is one error with its three lines, *accepted* means that the change did no harm to
the format (a comment, a value in its range). *Wrong* is any other exception, more than 10 seconds,
or more than 1 GB of memory.

{_inputs(found.inputs)}
## Corrupted artifacts

One bit of one output of a finished stage or export is flipped, then the outputs are checked as
every later stage checks what it reads.

{_flips(found.flips)}
## Kills and signals

{found.rounds.total()} rounds, in which every command is stopped at random moments between its start
and its usual end, and then run to its end: stages and exports as commands of their own (*stages*),
the same with `--force` over a finished run (*stages, forced*), the stages as one `run`. A round is
clean if its digests are those of an undisturbed one, nothing is left over, and no traceback was
printed.

{_rounds(found.rounds)}
{_stops(found.sent)}
## No room

Every command on a disk that takes no file above 500, 5,000 or 50,000 bytes, and in a folder that is
read-only or belongs to somebody else; then again with room, for the digests of an undisturbed run.

{_rooms(found.rooms)}
## Same inputs, same digests

Every stage and export is made again from the beginning, on one thread and on two, for
{_names(found.repeats)}.
`bench` holds times and is left out. The same digests are promised for the same number of threads,
not for another one, which adds numbers up in another order.

{_repeats(found.repeats)}
## What went wrong

{wrong}"""


def _inputs(inputs: Mapping[str, Counts]) -> str:
    rows = [
        (kind, counts.total(), counts["refused"], counts["accepted"], _wrong(counts))
        for kind, counts in inputs.items()
    ]
    total = [sum(int(row[column]) for row in rows) for column in range(1, 5)]
    return markdown_table(
        ("file", "tried", "refused", "accepted", "wrong"), [*rows, ("all", *total)]
    )


def _wrong(counts: Counts) -> int:
    return counts.total() - counts["refused"] - counts["accepted"]


def _flips(flips: Mapping[str, Counts]) -> str:
    rows = [
        (f"`{stage}`", counts.total(), counts["refused"], counts["accepted"] + counts["misnamed"])
        for stage, counts in sorted(flips.items())
    ]
    total = [sum(int(row[column]) for row in rows) for column in range(1, 4)]
    headers = ("artifact", "flips", "named and refused", "accepted or misnamed")
    return markdown_table(headers, [*rows, ("all", *total)])


def _rounds(rounds: Counts) -> str:
    methods = dict.fromkeys(key.partition(": ")[0] for key in rounds)
    rows = [(f"`{m}`", *(rounds[f"{m}: {form}"] for form in FORMS)) for m in methods]
    return markdown_table(("method: rounds", *FORMS), rows)


def _names(methods: Iterable[str]) -> str:
    return ", ".join(f"`{method}`" for method in methods) or "no method"


def _stops(sent: Counts) -> str:
    commands = list(dict.fromkeys(key.rpartition(" ")[0] for key in sorted(sent)))
    signals = ("SIGKILL", "SIGINT", "SIGTERM", "SIGHUP")
    rows = [(f"`{name}`", *(sent[f"{name} {each}"] for each in signals)) for name in commands]
    total = [sum(sent[f"{name} {each}"] for name in commands) for each in signals]
    return markdown_table(("command", *signals), [*rows, ("all", *total)])


def _rooms(rooms: Counts) -> str:
    forms = ("full", "read-only")
    rows = [(form, rooms[f"{form} refused"], rooms[f"{form} had room"]) for form in forms]
    return markdown_table(("", "refused with one error", "had room enough"), rows)


def _repeats(repeats: Mapping[str, Mapping[str, tuple[bool, bool]]]) -> str:
    stages = list(dict.fromkeys(stage for each in repeats.values() for stage in each))
    rows = []
    for stage in stages:
        results = [each[stage] for each in repeats.values() if stage in each]
        again, threads = (sum(result[n] for result in results) for n in range(2))
        count = len(results)
        rows.append((f"`{stage}`", f"{again} of {count}", f"{threads} of {count}"))
    return markdown_table(("artifact", "methods: same again", "same with two threads"), rows)
