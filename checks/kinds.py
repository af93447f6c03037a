"""What the schema is made of: sections, fields and kinds of values, and the words that say what a value may be."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

LOGGERS = (
    "console",
    "file",
    "tensorboard",
    "wandb",
    "mlflow",
    "swanlab",
    "vemlp_wandb",
    "clearml",
    "trackio",
    "rl_insight",
)


class Section(BaseModel):
    """A section of the config; keys that it does not declare are verl's to check."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def own(default: Any, meaning: str, *, shown: str | None = None, remedy: str | None = None):
    """A key of the README's table. shown: its default there; remedy: what a fault says besides the rule.

    The default is not the field's, as the config has every key.
    """
    return Field(description=meaning, json_schema_extra={"default": default, "shown": shown, "remedy": remedy})


def verl(remedy: str):
    """A key of verl's whose fault has a remedy besides the rule."""
    return Field(json_schema_extra={"remedy": remedy})


def unused(default: Any):
    """A setting of verl's that SPIN has no use for: it would be paid for, or ignored."""

    def same(value: Any) -> Any:
        if value != default:
            raise ValueError
        return value

    return Annotated[Any, AfterValidator(same), verl(f"SPIN does not use it; set it to {default}")]


def given(text: str) -> str:
    """Refuses what OmegaConf takes for a value that is still to come."""
    if text == "???":
        raise ValueError
    return text


Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Samples = Annotated[int, Field(ge=-1)]  # -1: all
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
LoraRank = Annotated[int, Field(ge=0, le=512)]  # vLLM's limit
TopK = Annotated[int, Field(ge=-1)]
Text = Annotated[str, Field(min_length=1), AfterValidator(given)]
# What verl's engine holds a model in, and what vLLM takes
Precision = Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]
RolloutPrecision = Literal["auto", "bfloat16", "float16", "half", "float32", "float"]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Files = Annotated[list[Text], Field(min_length=1), OneOrMore]
Loggers = Annotated[list[Literal[LOGGERS]], OneOrMore]


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds a section and not a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def rule_of(section: type[Section], name: str, field: FieldInfo) -> str:
    """What a field's value must be, in words, and its remedy."""
    words = _words(section.model_json_schema()["properties"][name])
    remedy = (field.json_schema_extra or {}).get("remedy")
    return "; ".join(filter(None, (words and f"must be {words}", remedy)))


def _words(schema: dict) -> str:
    """What a value may be, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_words, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "True or False",
        "string": "a text",
        "object": "a section of keys",
        "null": "null",
    }
    if schema.get("type") == "array":
        return f"a list, each {_words(schema['items'])}"
    words = kinds.get(schema.get("type"), "")
    limits = (("minimum", "of at least"), ("exclusiveMinimum", "above"), ("maximum", "and at most"))
    limits += (("exclusiveMaximum", "and below"),)
    return words + "".join(f" {phrase} {schema[limit]:g}" for limit, phrase in limits if limit in schema)
