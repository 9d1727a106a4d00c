"""The API against its own page: requests made from the schema, right and wrong ones."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.openapi.checks import RejectedPositiveData

from rempart.serve.app import create_app
from rempart.serve.settings import Settings

_SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, schemathesis.APIOperation]]:
    app = create_app(Settings(folder=tmp_path_factory.mktemp("deployment") / "data"))
    schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", app)
    yield {found.ok().label: found.ok() for found in schema.get_all_operations()}
    app.extensions["rempart"].jobs.table.destroy()


def test_no_answer_is_a_failure_or_off_the_page(operations: dict[str, schemathesis.APIOperation]) -> None:
    seen: set[int] = set()
    for operation in operations.values():
        cases = operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @settings(_SETTINGS)
        @given(cases)
        def check(case: schemathesis.Case) -> None:
            answer = case.call()
            seen.add(answer.status_code)
            try:
                case.validate_response(answer)
            except FailureGroup as found:
                left = [failure for failure in found.exceptions if not isinstance(failure, RejectedPositiveData)]
                assert not left, left  # a request of the right form may still name what is not here
            assert answer.status_code < 500, answer.text

        check()
    assert {200, 404, 422} <= seen, "the requests reach further than the first check"
