"""How a budget is shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streammerge.memory import share_out

WANTS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 100)).map(lambda one: (one[0], sum(one))),
    max_size=6,
)


@given(st.integers(0, 500), WANTS)
def test_each_gets_its_least_and_none_more_than_its_most(
    nbytes: int, wants: list[tuple[int, int]]
) -> None:
    shares = share_out(nbytes, wants)
    least = sum(least for least, _ in wants)
    assert all(low <= share <= high for share, (low, high) in zip(shares, wants, strict=True))
    assert sum(shares) <= max(nbytes, least)
    if nbytes >= sum(most for _, most in wants):
        assert shares == [most for _, most in wants]


def test_the_rest_goes_where_it_is_of_use() -> None:
    assert share_out(60, [(10, 10), (10, 50), (10, 90)]) == [10, 20, 30]
