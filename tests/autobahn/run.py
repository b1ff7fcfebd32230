"""`make autobahn`: the Autobahn test suite against ``trunkline serve``, with compression on.

    python -m tests.autobahn.run                   everything, some 20 minutes: groups 12 and 13 send 216,000 messages
    python -m tests.autobahn.run --cases '[1-9].*' '10.*'     the protocol without compression, half a minute

Prints a line for each group of cases and each case that failed; exit status 1 if any did. The cases are Autobahn's
own; ``kosoku`` runs them (the original runner knows Python 2 only) and judges as Autobahn does: a case has passed
if it is OK, NON-STRICT or INFORMATIONAL. Server pings are off, for the cases count what comes.

Run it as a process of its own: kosoku puts modules of Autobahn's name before the real ones.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter

from tests.system.processes import Served

# Most cases give the server a second, which a machine that stalls may take from it. Which of a few failed by that, is
# found by running them once more, alone: a fault fails each time.
AGAIN_MAX = 10
GROUPS = tuple(f"{number}.*" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13))
FLAGS = ("--ws-per-message-deflate", "--ws-ping-interval", "0", "--no-access-log")


def take_uncompressed_answers():
    """Let the cases of groups 12 and 13 understand an answer that is not compressed.

    RFC 7692 section 6 lets a sender choose for each message, and we leave small ones as they are. The cases expect
    bytes; kosoku hands them bytes for compressed messages and, as Python 2 did for all, a str of bytes for others.
    """
    from kosoku import _caseindex

    _caseindex.initialize_shims()
    import case12_x_x

    for case in (*case12_x_x.Case12_X_X, *case12_x_x.Case13_X_X):
        case.onMessage = _with_bytes(case.onMessage)


def _with_bytes(on_message):
    def called(self, message, is_binary):
        on_message(self, message.encode("latin-1") if isinstance(message, str) else message, is_binary)

    return called


async def run(url, patterns, excluded, concurrency):
    """Run the cases; return their results."""
    from kosoku import FailureError, run_fuzzingclient

    try:
        return await run_fuzzingclient(url, patterns, excluded, concurrency=concurrency)
    except FailureError as failure:
        return failure.results


def run_until_sure(url, pattern, excluded, concurrency):
    """As ``run``, but a few cases that failed run again."""
    results = asyncio.run(run(url, [pattern], excluded, concurrency))
    failed = [result.case_id for result in results if not result.passed]
    if not 0 < len(failed) <= AGAIN_MAX:
        return results
    print(f"{pattern:6} again: {', '.join(failed)}", flush=True)
    return [*(result for result in results if result.passed), *asyncio.run(run(url, failed, excluded, 1))]


def main():
    parser = argparse.ArgumentParser(description="The Autobahn test suite against trunkline serve.")
    parser.add_argument("--cases", nargs="+", default=GROUPS, metavar="CASE", help="such as 1.1.1 or '6.*' (all)")
    parser.add_argument("--exclude", nargs="+", metavar="CASE")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="cases at a time (2)")
    arguments = parser.parse_args()
    take_uncompressed_answers()
    counts = Counter()
    failed_count = 0
    with Served("tests.autobahn.application:application", *FLAGS) as served:
        for pattern in arguments.cases:
            start = time.monotonic()
            results = run_until_sure(served.ws_url, pattern, arguments.exclude, arguments.parallel)
            of_group = Counter(result.behavior.value for result in results)
            counts += of_group
            shown = ", ".join(f"{count} {behavior}" for behavior, count in sorted(of_group.items()))
            print(f"{pattern:6} {shown}, {time.monotonic() - start:.0f} s", flush=True)
            failed = [result for result in results if not result.passed]
            failed_count += len(failed)
            for result in failed:
                print(
                    f"  {result.case_id} {result.behavior.value}, close {result.behavior_close.value}: "
                    f"{result.result} {result.result_close}"
                )
        status = served.stop()
    shown = ", ".join(f"{count} {behavior}" for behavior, count in sorted(counts.items()))
    print(f"{sum(counts.values())} cases: {shown}; {failed_count} failed; the server's exit status was {status}")
    return 1 if failed_count or status != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
