"""Penstock: a plugin-based AI gateway. The names here are the public API for plugins and embedding programs."""

from penstock.asgi import Mount
from penstock.editing import Chunk
from penstock.endpoints import Endpoint
from penstock.envelopes import header_stem
from penstock.errors import ConfigurationError, PenstockError, PluginError, RequestError, UpstreamError
from penstock.evaluators import (
    ALL_DIRECTIONS,
    ALLOW,
    GUARDRAIL_OUTCOMES,
    Check,
    Direction,
    Evaluator,
    EvaluatorRegistry,
    GuardrailCounts,
    GuardrailOutcome,
    Subject,
    TextEdit,
    TextKind,
    Verdict,
)
from penstock.forwarding import (
    Address,
    address_of,
    bearer,
    forward,
    header_fields,
    put_model,
    with_headers,
)
from penstock.headers import Headers
from penstock.heads import RequestHead, ResponseHead, read_response_head
from penstock.hookspecs import hookimpl
from penstock.http_providers import AnthropicProvider, HTTPProvider, OpenAIProvider
from penstock.inner import INNER, GatewayCall
from penstock.inspection import editable_body
from penstock.keys import KeyHasher, display_prefix, hash_key, is_well_formed, new_key
from penstock.metering import BodyWindow
from penstock.models import (
    Attempt,
    Candidate,
    Exchange,
    Principal,
    ProviderBinding,
    RateLimits,
    Request,
    Response,
    Secret,
    StateKey,
    Timeouts,
    TraceContext,
    Usage,
)
from penstock.peek import RequestPeek
from penstock.policies import Fallback, GuardrailAttachment, PatternRules, PolicyRules
from penstock.providers import (
    Origin,
    Provider,
    Receiver,
    ResponseFilter,
    Transport,
    UpstreamRequest,
    UpstreamResponse,
)
from penstock.services import (
    BindingDirectory,
    Fetch,
    FetchedResponse,
    KeyDirectory,
    KeyRecord,
    Services,
)
from penstock.sse import Event
from penstock.structuring import faults_of, suggest
from penstock.translation import ReplyTranslation, Translated, Translator, TranslatorRegistry

__version__ = "0.1.0"

__all__ = [
    "ALLOW",
    "ALL_DIRECTIONS",
    "GUARDRAIL_OUTCOMES",
    "INNER",
    "Address",
    "AnthropicProvider",
    "Attempt",
    "BindingDirectory",
    "BodyWindow",
    "Candidate",
    "Check",
    "Chunk",
    "ConfigurationError",
    "Direction",
    "Endpoint",
    "Evaluator",
    "EvaluatorRegistry",
    "Event",
    "Exchange",
    "Fallback",
    "Fetch",
    "FetchedResponse",
    "GatewayCall",
    "GuardrailAttachment",
    "GuardrailCounts",
    "GuardrailOutcome",
    "HTTPProvider",
    "Headers",
    "KeyDirectory",
    "KeyHasher",
    "KeyRecord",
    "Mount",
    "OpenAIProvider",
    "Origin",
    "PatternRules",
    "PenstockError",
    "PluginError",
    "PolicyRules",
    "Principal",
    "Provider",
    "ProviderBinding",
    "RateLimits",
    "Receiver",
    "ReplyTranslation",
    "Request",
    "RequestError",
    "RequestHead",
    "RequestPeek",
    "Response",
    "ResponseFilter",
    "ResponseHead",
    "Secret",
    "Services",
    "StateKey",
    "Subject",
    "TextEdit",
    "TextKind",
    "Timeouts",
    "TraceContext",
    "Translated",
    "Translator",
    "TranslatorRegistry",
    "Transport",
    "UpstreamError",
    "UpstreamRequest",
    "UpstreamResponse",
    "Usage",
    "Verdict",
    "address_of",
    "bearer",
    "display_prefix",
    "editable_body",
    "faults_of",
    "forward",
    "hash_key",
    "header_fields",
    "header_stem",
    "hookimpl",
    "is_well_formed",
    "new_key",
    "put_model",
    "read_response_head",
    "suggest",
    "with_headers",
]
