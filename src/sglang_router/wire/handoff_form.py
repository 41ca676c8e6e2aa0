"""What the answer of a prefill worker hands over, as vLLM writes it: a record of its own, which is not compiled."""

from __future__ import annotations

import msgspec


class HandoffForm(msgspec.Struct, gc=False):
    """An answer of a prefill worker. kv_transfer_params: as it came; b"null" or b"" for nothing."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"")


class TransferForm(msgspec.Struct, gc=False):
    """What is read of these parameters. transfer_mode: "pull" or "push"; "": versions before 0.32 do not say."""

    transfer_mode: str = ""
