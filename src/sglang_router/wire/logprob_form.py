"""Where `/generate` of SGLang tells the log probabilities of a prompt: records of their own, which are not compiled."""

from __future__ import annotations

import msgspec


class MetaForm(msgspec.Struct, gc=False):
    """`meta_info` of one answer. input_token_logprobs: the list as it came; b"" for none."""

    input_token_logprobs: msgspec.Raw = msgspec.Raw(b"")


class ResultForm(msgspec.Struct, gc=False):
    """One answer, or one event of a stream. index: which prompt of several it is about; None: there is one."""

    meta_info: MetaForm | None = None
    index: int | None = None
