"""Let pytest explain the assertions of the shared checks."""

import pytest

pytest.register_assert_rewrite("contracts.conformance")
