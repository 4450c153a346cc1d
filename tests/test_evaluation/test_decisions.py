"""Decisions come back from their table, and intervals are those of the paired bootstrap."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from gplq_mm.errors import DataError
from gplq_mm.evaluation import Decisions, accuracy_difference

NUMBERS = st.integers(0, 999)


@st.composite
def tables(draw):
    count = draw(st.integers(0, 6))
    column = st.lists(NUMBERS, min_size=count, max_size=count)
    # No path has a NUL; line breaks it may have.
    name = st.text(st.characters(exclude_characters='\0'), min_size=1)
    names = st.lists(name, min_size=count, max_size=count, unique=True)
    states = draw(st.lists(st.sampled_from(['fp32', 'w32a4', 'w4a4']), unique=True))
    return Decisions(draw(names), draw(column), {state: draw(column) for state in states})


@given(tables())
@example(Decisions(['a\rb', 'a\nb', 'a\r\n"b"'], [0, 1, 2], {'fp32': [0, 1, 2]}))
def test_a_table_comes_back(decisions):
    assert Decisions.from_csv(decisions.to_csv()) == decisions


def test_a_table_is_one_that_any_program_reads():
    decisions = Decisions(['a/1.jpg', 'b, c/2.jpg'], [0, 701], {'fp32': [0, 3], 'w4a4': [1, 701]})
    assert decisions.to_csv() == (
        '"image","label","fp32","w4a4"\n"a/1.jpg",0,0,1\n"b, c/2.jpg",701,3,701\n'
    )
    assert decisions.correct('fp32').tolist() == [True, False]


@pytest.mark.parametrize(
    'text', ['', 'image\n', 'image,label,fp32\na,1\n', 'a,0,1\n', 'image,label\na,b\n']
)
def test_another_table_is_refused(text):
    with pytest.raises(DataError, match=r'a table of decisions has .*--decisions write it again'):
        Decisions.from_csv(text)


def test_states_of_the_same_images_are_kept_together():
    decisions = Decisions(['a', 'b'], [0, 1], {'fp32': [0, 1]})
    decisions.add(Decisions(['a', 'b'], [0, 1], {'w4a4': [0, 0]}))
    assert decisions.predictions == {'fp32': [0, 1], 'w4a4': [0, 0]}
    decisions.add(Decisions(['a', 'c'], [0, 1], {'w4a4': [0, 0]}))
    assert decisions == Decisions(['a', 'c'], [0, 1], {'w4a4': [0, 0]})


def drawn(count: int, *rates: float) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.random(count) < rate for rate in rates]


def test_the_interval_is_that_of_the_bootstrap():
    first, second = drawn(1290, 0.76, 0.81)
    found = accuracy_difference(first, second)
    per_image = first.astype(float) - second
    expected = stats.bootstrap(
        (per_image,), np.mean, method='percentile', random_state=np.random.default_rng(0)
    ).confidence_interval
    assert found['points'] == pytest.approx(100 * per_image.mean())
    assert [found['low'], found['high']] == pytest.approx([100 * x for x in expected], abs=0.3)
    narrow = accuracy_difference(first, second, confidence=0.5)
    assert found['low'] < narrow['low'] < narrow['high'] < found['high']


def test_of_runs_the_mean_is_compared():
    first, other, second = drawn(1290, 0.76, 0.78, 0.81)
    found = accuracy_difference([first, other], second)
    assert found['points'] == pytest.approx(
        np.mean([accuracy_difference(x, second)['points'] for x in (first, other)])
    )
    single = accuracy_difference(first, second)
    assert found['high'] - found['low'] < single['high'] - single['low']
    # A run that is the same twice says no more than once.
    assert accuracy_difference([first, first], second) == single


def test_the_interval_holds_the_difference_as_often_as_it_says():
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        first, second = generator.random((2, 500)) < [[0.7], [0.75]]
        found = accuracy_difference(first, second)
        inside += found['low'] <= -5.0 <= found['high']
    assert 0.92 <= inside / 400 <= 0.98


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_bounds_and_turned_round(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    found = accuracy_difference(first, second)
    assert -100 <= found['low'] <= found['points'] <= found['high'] <= 100
    assert found == accuracy_difference(first, second)
    turned = accuracy_difference(second, first)
    assert turned['points'] == pytest.approx(-found['points'])
    if first == second:
        assert found == {'points': 0.0, 'low': 0.0, 'high': 0.0}


@pytest.mark.parametrize('reference', [[], [True, False, True]])
def test_other_images_cannot_be_compared(reference):
    with pytest.raises(DataError, match='score both models on the same images'):
        accuracy_difference([True, False] if reference else [], reference)
