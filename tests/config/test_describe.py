"""Help and the JSON schema say of every setting what the schema says."""

from pathlib import Path

import yaml

from jaxgpt.config.describe import describe, explain, json_schema
from jaxgpt.config.fields import entry, sections, settings
from jaxgpt.config.load import load
from jaxgpt.config.schema import Config


def test_every_setting_is_described_with_default_type_and_meaning():
    text = describe(Config.model_fields)
    for setting in settings(Config):
        if sections(setting.annotation):
            assert setting.path in text
            continue
        rows = [n for n, line in enumerate(text) if line.split()[:1] in ([setting.path], [f"{setting.path}:"])]
        assert rows, setting.path
        meaning = " ".join(setting.info.description.split())
        assert any(text[row + 1].strip() == meaning for row in rows), setting.path
    assert "  sft.steps = 300  (a whole number, 1 or more)" in text
    assert "  mesh.fsdp = auto  (a whole number, 1 or more, or auto)" in text
    assert "  data.sources.NAME.path must be set  (text or a list of texts)" in text


def test_only_the_sections_asked_for_are_described():
    assert all("sft" in line for line in describe(["sft"]) if "=" in line and line[:3] == "  s")
    assert not any("ppo" in line for line in describe(["sft"]))


def test_the_schema_describes_a_config_file():
    schema = json_schema()
    assert (
        schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and schema["additionalProperties"] is False
    )
    assert set(schema["properties"]) == {*Config.model_fields, "base"}
    assert schema["$defs"]["SftConfig"]["properties"]["steps"] == {
        "default": 300,
        "description": "Optimizer updates.",
        "minimum": 1,
        "title": "Steps",
        "type": "integer",
    }
    assert schema["$defs"]["RewardConfig"]["properties"]["responses"]["maximum"] == 64
    assert {"$ref": "#/$defs/ModelConfig"} in schema["properties"]["model"]["anyOf"]  # or the name of a group
    assert "string" in [choice.get("type") for choice in schema["properties"]["model"]["anyOf"]]
    assert schema["$defs"]["ModelConfig"]["properties"]["positions"]["discriminator"]["propertyName"] == "type"


def test_every_reference_of_the_schema_resolves():
    schema = json_schema()

    def references(part) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return own + [name for value in part.values() for name in references(value)]
        return [name for value in part for name in references(value)] if isinstance(part, list) else []

    found = references(schema)
    assert len(found) > 20 and {name.removeprefix("#/$defs/") for name in found} <= set(schema["$defs"])


def test_settings_walks_the_whole_schema():
    paths = [setting.path for setting in settings(Config)]
    for path in ("ppo.kl.coef", "model.positions.scaling.factor", "data.sources.NAME.weight", "reward.data.eval_path"):
        assert path in paths
    assert all(setting.info.description for setting in settings(Config))
    assert entry(next(s for s in settings(Config) if s.path == "data.sources").annotation) is not None


def test_an_explained_config_is_the_config_with_the_source_of_every_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model:\n  width: 96\n  attention: {heads: 3}\nevaluate:\n  samples: [one, two]\n")
    loaded = load(Path("a.yaml"), ["seed=4", f"evaluate.samples=[{'x' * 90}, y]"])
    text = explain(loaded)
    lines = [line.split("  # ") for line in text.splitlines()]
    sources = {line[0].strip(): line[1] for line in lines if len(line) == 2}
    assert (
        sources["width: 96"] == "a.yaml:2"
        and sources["heads: 3"] == "a.yaml:3"
        and sources["seed: 4"] == "command line 'seed=4'"
    )
    assert sources["context: 256"] == "default" and len(sources) == len(
        set(map(tuple, (k.split(".") for k in sources)))
    )
    assert yaml.safe_load(text) == loaded.config.model_dump(mode="json")
    Path("b.yaml").write_text(text)
    assert load(Path("b.yaml")).config == loaded.config
