"""What of the KV stays on the device: as much as fits, never more, and every byte told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from wsm.layout.kv import KVLayout
from wsm.plan.hardware import MIB
from wsm.plan.kv import KVCosts, kv_gpu_lines, place_kv

layouts = st.builds(
    KVLayout,
    n_layers=st.integers(1, 40),
    batch=st.integers(1, 70),
    stretch_rows=st.integers(1, 16),
    n_kv_heads=st.sampled_from([1, 2, 8]),
    tokens=st.sampled_from([256, 1024, 2304]),
    record_bytes=st.sampled_from([48, 136, 256]),
)


@given(layout=layouts, share=st.floats(0.0, 1.2), bounds=st.sampled_from([0, 4096]), on_gpu=st.booleans())
@hypothesis_settings(max_examples=300, deadline=None)
def test_what_stays_on_the_device_fits_the_room_that_it_was_given(
    layout: KVLayout, share: float, bounds: int, on_gpu: bool
) -> None:
    costs = KVCosts(bounds, on_gpu, None)
    whole = layout.batch * layout.n_layers * layout.row_bytes
    room = int(share * whole) + 64 * MIB
    placed = place_kv(layout, room, 1 << 50, costs)
    gpu = kv_gpu_lines(placed, costs)
    least = kv_gpu_lines(place_kv(layout, 0, 1 << 50, costs), costs)
    taken = sum(line.nbytes for line in gpu)
    assert taken <= max(room, sum(line.nbytes for line in least))
    assert sorted((*placed.gpu, *placed.cpu)) == sorted(layout.units())
