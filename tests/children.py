"""Processes that run a function of a test, and may be killed.

A server of their own forks them: a fork of pytest's worker, which has threads, may hang, and Python 3.12 warns of it.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

CONTEXT = multiprocessing.get_context("forkserver")


def child(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a function of a module, with arguments that can be pickled, in a process of its own."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process
