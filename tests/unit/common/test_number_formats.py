"""Number formats on the wire: what rounding does to a number, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.adapter import AdapterSpec
from common.errors import WireError
from common.number_formats import LARGEST, NumberFormat, decode, encode, layout, names_of, part_of

finite = st.floats(min_value=-(2.0**99), max_value=2.0**99, width=32, allow_subnormal=True)
shapes = st.sampled_from([(), (1,), (7,), (384, 8), (8, 384), (3, 3), (2, 5, 3), (0, 4)])
FORMATS: tuple[NumberFormat, ...] = ("fp32", "bf16", "int8")


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Of ordinary, tiny and enormous numbers."""
    drawn: np.ndarray = draw(hnp.arrays(np.float32, draw(shapes), elements=finite, fill=st.just(np.float32(0.5))))
    return drawn


def spec_of(tensors: dict[str, np.ndarray]) -> AdapterSpec:
    return AdapterSpec.of("base", {name: array.shape for name, array in tensors.items()})


def through(array: np.ndarray, form: NumberFormat, draw: Any = None) -> np.ndarray:
    tensors = {"x": array}
    return decode(encode(tensors, form, draw), spec_of(tensors), form)["x"]


def test_fp32_is_the_tensor_itself() -> None:
    array = np.array([[np.nan, -0.0], [np.inf, 1e-45]], np.float32)
    assert encode({"x": array}, "fp32")["x"].tobytes() == array.tobytes() == through(array, "fp32").tobytes()


def test_a_row_of_integers_by_hand() -> None:
    """Scale 254/127 = 2: 5 is 2.5 scales and 7 is 3.5, which go to the even neighbours 2 and 4."""
    sent = encode({"x": np.array([[254, 5, 7, -3], [0, 0, 0, 0]], np.float32)}, "int8")
    assert sent["scale/x"].tolist() == [2.0, 0.0] and sent["scale/x"].dtype == np.float32
    assert sent["x"].tolist() == [[127, 2, 4, -2], [0, 0, 0, 0]] and sent["x"].dtype == np.int8
    assert through(np.array([[254, 5, 7, -3]], np.float32), "int8").tolist() == [[254.0, 4.0, 8.0, -4.0]]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((384, 8), 8), ((8, 384), 8), ((11, 384), 11), ((11,), 1), ((), 1), ((3, 3), 3), ((2, 5, 3), 6)],
)
def test_rows_run_along_the_longest_axis(shape: tuple[int, ...], scales: int) -> None:
    tensors = {"x": np.ones(shape, np.float32)}
    sent = encode(tensors, "int8")
    assert sent["scale/x"].shape == (scales,)
    assert {name: (array.dtype, array.shape) for name, array in sent.items()} == layout(spec_of(tensors), "int8")
    if shape == (384, 8):  # each column its own scale
        columns = np.tile(2.0 ** np.arange(8, dtype=np.float32), (384, 1))
        assert np.allclose(through(columns, "int8"), columns, rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(arrays())
def test_int8_is_off_by_at_most_half_a_scale_to_the_nearest_and_by_less_than_one_at_random(array: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    sent = encode({"x": array}, "int8")
    axis = max(range(array.ndim), key=lambda one: (array.shape[one], one)) if array.ndim else None
    scale = np.expand_dims(sent["scale/x"].reshape(np.max(array, axis=axis, initial=0).shape), axis or 0)
    scale = scale.reshape(()) if array.ndim == 0 else scale
    tiny = 128 * np.finfo(np.float32).smallest_subnormal  # below, a scale itself is rounded
    nearest, at_random = through(array, "int8"), through(array, "int8", lambda name, n: generator.random(n))
    exact = array.astype(np.float64)
    assert np.all(np.abs(nearest - exact) <= 0.5001 * scale + tiny)
    assert np.all(np.abs(at_random - exact) <= 1.0001 * scale + tiny)
    assert np.isfinite(nearest).all() and np.isfinite(at_random).all()


def test_rounding_at_random_is_exact_on_average() -> None:
    """Brute force: over all thousandths that a draw can be, a number's mean is the number."""
    array = np.array([127.0, 0.25, -0.25, 3.999, -126.5, 64.0], np.float32)  # scale 1
    draws = [(k + 0.5) / 1000 for k in range(1000)]
    means = np.mean([through(array, "int8", lambda name, n, u=u: np.full(n, u)) for u in draws], axis=0)
    assert np.allclose(means, array, atol=1e-3)
    assert {float(v) for u in draws for v in through(array, "int8", lambda name, n, u=u: np.full(n, u))[1:2]} == {0, 1}


@settings(max_examples=100, deadline=None)
@given(arrays())
def test_bf16_is_what_torch_makes_of_it(array: np.ndarray) -> None:
    expected = torch.from_numpy(array.copy()).bfloat16()
    sent = encode({"x": array}, "bf16")["x"]
    assert sent.dtype == np.uint16
    assert np.array_equal(sent, expected.view(torch.uint16).numpy())
    assert np.array_equal(through(array, "bf16"), expected.float().numpy())


def test_bf16_ties_go_to_the_even_neighbour() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32)
    assert [hex(each) for each in encode({"x": bits.view(np.float32)}, "bf16")["x"]] == [
        "0x3f80",
        "0x3f82",
        "0x3f81",
        "0xbf80",
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_depends_on_the_layout_alone(form: NumberFormat) -> None:
    generator = np.random.default_rng(0)
    for shape in [(384, 8), (11,), ()]:
        drawn = [scale * generator.standard_normal(shape).astype(np.float32) for scale in (0.0, 1e-20, 1.0, 1e20)]
        sent = [encode({"x": np.asarray(array, np.float32)}, form) for array in drawn]
        found = {tuple((name, array.dtype, array.shape) for name, array in sorted(one.items())) for one in sent}
        assert len(found) == 1


def test_names_and_parts_keep_scales_with_their_tensors() -> None:
    sent = encode({"a": np.ones(2, np.float32), "b": np.ones((2, 3), np.float32)}, "int8")
    assert names_of(sent) == ("a", "b")
    assert sorted(part_of(sent, {"b"})) == ["b", "scale/b"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1.1e30])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_what_a_format_cannot_say_is_an_error_at_the_sender(form: NumberFormat, value: float) -> None:
    with pytest.raises(WireError, match=f"'x' holds numbers that are not finite or beyond 1e\\+30, which {form}"):
        encode({"x": np.array([0, value], np.float32)}, form)


SPEC = AdapterSpec.of("base", {"x": (2, 3)})
GOOD = encode({"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, "int8")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 2e30, 3e38])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(WireError, match="'scale/x' holds a scale"):
        decode({**GOOD, "scale/x": np.array([1, scale], np.float32)}, SPEC, "int8")


def test_nothing_overflows_in_decoding() -> None:
    largest = {"x": np.full((2, 3), -128, np.int8), "scale/x": np.full(2, LARGEST, np.float32)}
    with np.errstate(all="raise"):
        assert np.isfinite(decode(largest, SPEC, "int8")["x"]).all()


@pytest.mark.parametrize(
    ("form", "encoded"),
    [
        ("fp32", GOOD),
        ("bf16", GOOD),
        ("int8", {"x": np.zeros((2, 3), np.float32)}),
        ("bf16", {"x": np.zeros((2, 3), np.float32)}),
        ("fp32", {"x": np.zeros((2, 3), np.uint16)}),
        ("bf16", {"x": np.zeros((2, 3), np.int16)}),
        ("int8", {"x": GOOD["x"]}),
        ("int8", {"scale/x": GOOD["scale/x"]}),
        ("int8", {**GOOD, "y": GOOD["x"]}),
        ("int8", {**GOOD, "scale/y": GOOD["scale/x"]}),
        ("int8", {**GOOD, "x": GOOD["x"].view(np.uint8)}),
        ("int8", {**GOOD, "x": GOOD["x"].T}),
        ("int8", {**GOOD, "scale/x": np.ones(3, np.float32)}),
        ("int8", {**GOOD, "scale/x": np.ones((2, 1), np.float32)}),
        ("int8", {**GOOD, "scale/x": np.float32(1).reshape(())}),
        ("int8", {**GOOD, "scale/x": np.ones(2)}),
        ("int8", {}),
    ],
)
def test_another_layout_or_type_than_the_formats_is_refused(form: NumberFormat, encoded: dict[str, np.ndarray]) -> None:
    with pytest.raises(WireError, match="wire: "):
        decode(encoded, SPEC, form)
