"""Makes failed assertions in the contract suite as readable as those in test modules."""

import pytest

pytest.register_assert_rewrite("tests.channel_layer.contract")
