"""A transfer engine for processes of one machine: it writes into the memory of another one."""

import ctypes
import os
from collections.abc import Sequence

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PTRACER, ANYBODY = 0x59616D61, ctypes.c_ulong(-1)


class Span(ctypes.Structure):
    """`iovec`."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


class TransferEngine:
    """Mooncake's engine as SGLang calls it. A session is named by its process."""

    def initialize(self, *_: str) -> int:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        # Else SGLang reads pages' numbers back through pinned memory, which needs a GPU.
        MooncakeKVSender.supports_host_tensor_indices = False
        # Processes that are no relatives may write here, under Yama's rules too.
        LIBC.prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
        return 0

    def get_rpc_port(self) -> int:
        return os.getpid()

    def batch_register_memory(self, *_: Sequence[int]) -> int:
        return 0

    batch_unregister_memory = batch_register_memory

    def batch_transfer_sync_write(
        self, session: str, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Copy each span; -1: the other process is gone, or has no such memory."""
        pid = int(session.rpartition(":")[2])
        for source, target, length in zip(sources, targets, lengths, strict=True):
            here, there = Span(source, length), Span(target, length)
            written = LIBC.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if written != length:
                return -1
        return 0
