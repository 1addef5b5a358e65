"""Places that the model of streams gives to tensors of a CPU, which do not say where they would be on a GPU."""

import torch
from streams import Streams
from watching import watching


def test_a_cpus_tensors_have_places() -> None:
    """A literal, a list and pinned memory are the host's; what is read of others is waited for, or comes late."""
    world = Streams()
    with world.installed(), watching(world):
        staged = torch.zeros(3, pin_memory=False)
        source, stream, done = torch.tensor([1.0, 2.0], device="cpu:0"), torch.cpu.Stream(), torch.cpu.Event()
        assert sum(world.pageable.values()) == 1, "a list that becomes a tensor of the device"
        stream.wait_stream(torch.cpu.current_stream())
        with torch.cpu.stream(stream):
            staged.to("cpu:0", non_blocking=True)
            late = world.async_d2h(source)
            done.record()
        assert late.isnan().all()
        staged[0] = 2.0
        found = {text.split(",")[0].replace(stream.name, "it") for text in world.races}
        assert found == {"host writes what it reads", "host reads what it wrote"}
        done.synchronize()
        assert late.tolist() == [1.0, 2.0]
        assert not world.stalls
        source.tolist()
        assert sum(world.stalls.values()) == 1
