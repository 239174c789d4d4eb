"""Runs the tests of the running server: a line `ok`, `not ok` or `skip` for each.

    run.py [NAME...]    all, or those whose name contains one of the words
"""
import os
import signal
import sys
import time
import unittest

TEST_SECONDS = 90       # a test that takes longer hangs


class Lines(unittest.TestResult):
    def startTest(self, test):
        super().startTest(test)
        signal.alarm(TEST_SECONDS)

    def stopTest(self, test):
        super().stopTest(test)
        signal.alarm(0)

    def line(self, verdict, test, why=''):
        name = test.id() if hasattr(test, 'id') else str(test)
        print(f'{verdict} {name}' + (f': {why}' if why else ''), flush=True)

    def failure(self, test, error):
        *trace, last = self._exc_info_to_string(error, test).rstrip().split('\nTraceback')[-1] \
            .split('\n')
        self.line('not ok', test, last if last.strip() else repr(error[1]))
        print('\n'.join('    ' + part for part in [*trace, last]), flush=True)

    def addSuccess(self, test):
        self.line('ok', test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.line('skip', test, reason)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.failure(test, err)

    def addError(self, test, err):
        super().addError(test, err)
        self.failure(test, err)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.failure(subtest, err)


def expired(*_):
    raise AssertionError(f'more than {TEST_SECONDS} s')


def tests_of(suite):
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from tests_of(part)
        else:
            yield part


def main(words):
    signal.signal(signal.SIGALRM, expired)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    here = os.path.dirname(os.path.abspath(__file__))
    found = list(tests_of(unittest.defaultTestLoader.discover(here, top_level_dir=here)))
    chosen = [t for t in found if not words or any(word in t.id() for word in words)]
    result, begin = Lines(), time.monotonic()
    unittest.TestSuite(chosen).run(result)
    print(f'# {result.testsRun} tests in {time.monotonic() - begin:.1f} s', flush=True)
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
