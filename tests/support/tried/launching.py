"""Answers to the exercises of lesson 07."""

from __future__ import annotations

from pathlib import Path

from course_lib.launch import cluster
from course_lib.lesson.exercises import launching
from support.tried import Tried


def copies_on_two_nodes(folder: Path) -> Tried:
    """Every rank a copy, and one node only."""
    model = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "tensor_model_parallel_size": 2}
    cfg = {"model": model, "train": {"global_batch_size": 8, "micro_batch_size": 1}}
    return Tried(8, [(16, "a copy of its own"), (4, "for one node"), (2, "over all nodes")], [cfg, 16])


def second_nodes_command(folder: Path) -> Tried:
    """The command of node 0, one node alone, a node too many, and another meeting point."""
    first, second = cluster.agents(folder, nodes=2, ranks_per_node=8, address="node-0", port=29500)

    def with_word(after: str, word: str) -> list[str]:
        place = second.index(after) + 1
        return [*second[:place], word, *second[place + 1 :]]

    wrong = [
        (first, "both be node 0"),
        ([*second[:3], "--standalone", *second[3:]], "a job of its own"),
        (with_word("--node-rank", "2"), "counted from 0"),
        (with_word("--master-addr", "node-1"), "meet at one place"),
        (with_word("--nnodes", "1"), "`--nnodes`"),
    ]
    return Tried(second, wrong, [first, 2])


def first_failure(folder: Path) -> Tried:
    """The log that one opens first, the loudest one, and one that lost a peer."""
    assert "FileNotFoundError" in launching.failed_run(folder / "run").log(launching.CULPRIT)
    wrong = [
        ((0, "TimeoutError"), "opens first"),
        ((3, "MemoryError"), "last and loudest"),
        ((5, "RuntimeError"), "lost a peer"),
        ((6, "RuntimeError"), "name of the exception"),
    ]
    return Tried((6, "FileNotFoundError"), wrong)
