from hypothesis import given
from hypothesis import strategies as st

from famt.pipeline.sharding.writer import safe_key


def test_keys_hold_letters_digits_dashes_and_underscores():
    assert safe_key("a b/ü.x y.jpg") == "a_b___x_y"


@given(st.text(min_size=1))
def test_any_name_becomes_a_key_that_dali_reads(name):
    assert set(safe_key(name)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
    )
