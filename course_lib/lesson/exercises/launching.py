"""Lesson 07: copies on two nodes, the command of the second node, and eight logs of a run that failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from course_lib import runs
from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong
from course_lib.planning import layout

CULPRIT, RANKS = 6, 8
"""Of the run that failed."""


def copies_on_two_nodes(answer: int, cfg: Any, ranks: int) -> Verdict:
    """How many copies of the model train on so many ranks?"""
    sizes = layout.require(cfg, ranks)
    return value(
        answer,
        sizes.data_parallel_size,
        why="each copy takes TP x PP ranks, and a second node brings more copies and no larger ones.",
        otherwise="TP x PP x DP is the world size, over all nodes.",
        hints=[
            (ranks, "Each rank would be a copy of its own then; here TP ranks share one."),
            (sizes.data_parallel_size // 2, "That is for one node; the world size counts the ranks of both."),
        ],
    )


def second_nodes_command(answer: Sequence[str], first: Sequence[str], nodes: int) -> Verdict:
    """Which command starts the ranks of the last node?

    Args:
        answer: The words of the command.
        first: The words of the command of node 0.
        nodes: So many nodes.
    """
    if isinstance(answer, str) or not all(isinstance(word, str) for word in answer):
        raise Unfit("a list of words is asked for, as a program gets them, such as the one of node 0")
    words = dict(zip(answer, list(answer)[1:], strict=False))
    if "--standalone" in answer:
        return wrong(
            "`--standalone` makes this node a job of its own: it would train alone, and node 0 would wait for it."
        )
    if words.get("--nnodes") != str(nodes):
        return wrong(f"How many nodes take part? `--nnodes` has to say {nodes} on each of them.")
    if words.get("--node-rank") == "0":
        return wrong("Two nodes would both be node 0, and the job would wait for the other one until its time is over.")
    if words.get("--node-rank") != str(nodes - 1):
        return wrong(f"Nodes are counted from 0: which number has the last of {nodes}?")
    theirs = dict(zip(first, list(first)[1:], strict=False))
    if other := [name for name in ("--master-addr", "--master-port") if words.get(name) != theirs[name]]:
        return wrong(f"{', '.join(other)}: all nodes meet at one place, that of node 0.")
    if list(answer)[answer.index("-m", 3) :] != list(first)[list(first).index("-m", 3) :]:
        return wrong("The program and its file are the same on every node.")
    return right("the commands of two nodes differ in one word, and in no other.")


def failed_run(folder: Path) -> runs.Run:
    """A run directory of eight ranks whose launcher was lost before it could write an outcome.

    Rank 6 did not find its data; the others lost a peer, or ran into what that left behind.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}\n", encoding="utf-8")
    (folder / "launch.json").write_text(json.dumps({"ranks": RANKS, "device": "cpu"}), encoding="utf-8")
    start = "loading the data of step 1\n"
    lost = "14:02:{second:02d} RuntimeError: connection closed by peer [127.0.0.1]: rank {peer} is gone\n"
    for rank in range(RANKS):
        words = lost.format(second=13 + rank % 3, peer=CULPRIT if rank % 2 else (rank + 1) % RANKS)
        if rank == 0:
            words += "14:02:17 TimeoutError: the store was not answered within 5 s\n"
        if rank == CULPRIT:
            words = "14:02:11 FileNotFoundError: /data/part-0006.idx does not exist: .bin and .idx belong together\n"
        if rank == 3:
            words += "14:02:19 MemoryError: cannot write the trace of an error\n"
        (folder / "logs" / f"rank_{rank}.log").write_text(f"14:02:10 {start}{words}", encoding="utf-8")
    return runs.Run(folder)


def first_failure(answer: tuple[int, str]) -> Verdict:
    """Which rank failed first, and with which exception?"""
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != 2:
        raise Unfit('a pair is asked for, a rank and the name of its exception, such as `(0, "ValueError")`')
    rank, name = answer
    if rank == 0:
        return wrong("Rank 0 is whose log one opens first; it only says that somebody did not answer.")
    if rank == 3:
        return wrong("Rank 3 wrote last and loudest, after its neighbour was gone: look at the times.")
    if rank != CULPRIT:
        return wrong(f"Rank {rank} lost a peer; that is what a failure looks like from the outside.")
    if name != "FileNotFoundError":
        return wrong("The right rank; what is the name of the exception that it wrote?")
    return right(
        "the earliest error that is its own, and not the loss of another; the mend is to copy the missing `.idx`."
    )
