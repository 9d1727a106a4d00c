"""The error tree: the three-part message, exit codes, and the trip across a process border."""

import copy
import pickle

import pytest

from rempart.core import errors
from rempart.core.errors import Cancelled, DataError, RempartError, SpecError

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RempartError)]


def test_message_says_what_was_expected_what_came_and_what_to_try():
    assert str(DataError("8 rows", got=3, hint="read the file again")) == "expected 8 rows, got 3; read the file again"
    assert str(DataError("8 rows")) == "expected 8 rows"
    assert str(DataError("8 rows", got=0)) == "expected 8 rows, got 0"
    assert str(DataError("8 rows", hint="try")) == "expected 8 rows; try"


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_exit_codes_follow_the_command_line_contract(kind):
    wrong_request = {"SpecError", "ThreatError", "DataError", "ModelError"}
    assert kind.exit_code == (2 if kind.__name__ in wrong_request else 130 if kind is Cancelled else 3)
    assert issubclass(kind, ValueError) == (kind.__name__ in wrong_request)


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not Cancelled], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_errors_survive_a_process_border(kind, travel):
    error = kind("a thing", got={"k": 1}, hint="try")
    twin = travel(error)
    assert type(twin) is kind
    assert str(twin) == "expected a thing, got {'k': 1}; try"
    assert (twin.expected, twin.got, twin.hint) == ("a thing", {"k": 1}, "try")


def test_cancelled_survives_a_process_border():
    assert str(pickle.loads(pickle.dumps(Cancelled()))) == str(Cancelled())


def test_one_except_clause_catches_the_family():
    with pytest.raises(ValueError, match="expected x"):
        raise SpecError("x")
