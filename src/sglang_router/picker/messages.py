"""The messages between Envoy and an endpoint picker, as far as a picker needs them.

They are those of `envoy.service.ext_proc.v3.ExternalProcessor` (external_processor.proto, and what it takes from
base.proto, http_status.proto and processing_mode.proto). Only field numbers and types go over the wire: fields that are
not declared here are skipped when they come, and enumerations are whole numbers.

The package with all of Envoy's messages (xds-protos) is not used: it brings its own, older copy of OpenTelemetry's, and
overwrites with it what --enable-trace needs. So the messages are declared to protobuf here, in a pool of their own,
which gets into nobody's way either.

    ProcessingRequest    one of: headers, bodies and trailers of a request or of its answer; what the gateway knows
    ProcessingResponse   the answer to each of them, or the end of the request: an ImmediateResponse
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = "Process"

NONE, FULL_DUPLEX = 0, 4
"""Modes of a body in `protocol_config`: it is not sent to the picker; it is sent piece by piece, and given back so."""
OVERWRITE: Final = 2
"""`append_action`: replace the field, or add it."""

_PACKAGE: Final = "sglang_router.picker"
_STRUCT: Final = ".google.protobuf.Struct"
_TABLE: Final[dict[str, str]] = {
    "HeaderValue": "1 key string, 2 value string, 3 raw_value bytes",
    "HeaderMap": "1 headers HeaderValue*",
    "HeaderValueOption": "1 header HeaderValue, 3 append_action int32",
    "HeaderMutation": "1 set_headers HeaderValueOption*, 2 remove_headers string*",
    "StreamedBodyResponse": "1 body bytes, 2 end_of_stream bool",
    "BodyMutation": "3 streamed_response StreamedBodyResponse",
    "CommonResponse": "2 header_mutation HeaderMutation, 3 body_mutation BodyMutation, 5 clear_route_cache bool",
    "HeadersResponse": "1 response CommonResponse",
    "BodyResponse": "1 response CommonResponse",
    "TrailersResponse": "1 header_mutation HeaderMutation",
    "HttpStatus": "1 code int32",
    "ImmediateResponse": "1 status HttpStatus, 2 headers HeaderMutation, 3 body bytes, 5 details string",
    "HttpHeaders": "1 headers HeaderMap, 3 end_of_stream bool",
    "HttpBody": "1 body bytes, 2 end_of_stream bool",
    "HttpTrailers": "1 trailers HeaderMap",
    "FilterMetadataEntry": f"1 key string, 2 value {_STRUCT}",
    "Metadata": "1 filter_metadata FilterMetadataEntry*",
    "ProtocolConfiguration": "1 request_body_mode int32, 2 response_body_mode int32",
    "ProcessingRequest": (
        "2 request_headers HttpHeaders|, 3 response_headers HttpHeaders|, 4 request_body HttpBody|,"
        "5 response_body HttpBody|, 6 request_trailers HttpTrailers|, 7 response_trailers HttpTrailers|,"
        "8 metadata_context Metadata, 11 protocol_config ProtocolConfiguration"
    ),
    "ProcessingResponse": (
        "1 request_headers HeadersResponse|, 2 response_headers HeadersResponse|, 3 request_body BodyResponse|,"
        "4 response_body BodyResponse|, 5 request_trailers TrailersResponse|, 6 response_trailers TrailersResponse|,"
        f"7 immediate_response ImmediateResponse|, 8 dynamic_metadata {_STRUCT}"
    ),
}
"""The fields of each message: number, name, type. `*`: any number of them; `|`: one of these, called `kind`."""

_SCALARS: Final = {
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
}


def _declare() -> dict[str, Any]:
    """Return the classes of all messages, by name."""
    file = descriptor_pb2.FileDescriptorProto(name="sglang_router/picker.proto", package=_PACKAGE, syntax="proto3")
    file.dependency.append(struct_pb2.DESCRIPTOR.name)
    for name, fields in _TABLE.items():
        message = file.message_type.add(name=name)
        for text in fields.split(","):
            number, field, kind = text.split()
            _add(message, int(number), field, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _TABLE}
    return {name: message_factory.GetMessageClass(each) for name, each in found.items()}


def _add(message: Any, number: int, name: str, kind: str) -> None:
    """Add a field to the declaration of a message."""
    proto = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=number, label=proto.LABEL_OPTIONAL)
    if kind.endswith("*"):
        field.label = proto.LABEL_REPEATED
    elif kind.endswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="kind")
        field.oneof_index = 0
    kind = kind.rstrip("*|")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = proto.TYPE_MESSAGE
        field.type_name = kind if kind.startswith(".") else f".{_PACKAGE}.{kind}"


_CLASSES: Final = _declare()
ProcessingRequest: Final[Any] = _CLASSES["ProcessingRequest"]
ProcessingResponse: Final[Any] = _CLASSES["ProcessingResponse"]
