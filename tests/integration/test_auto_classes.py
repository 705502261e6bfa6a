"""transformers' mappings from configurations to models, without importing them all."""

from __future__ import annotations

from helpers.interpreters import python


def test_auto_classes_are_told_apart_without_importing_all(demo):
    """As the full lists say, for every configuration of transformers and for one of the same name from elsewhere."""
    code = f"""
        import sys
        from llamafactory.chat import ChatModel
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from llamafactory_kt.integration import auto_classes
        keys = dict(model_name_or_path={str(demo / "model")!r}, template="deepseek", use_kt=True, kt_backend="torch")
        ChatModel(keys)
        print(len([name for name in sys.modules if ".configuration_" in name and "transformers.models." in name]))
        import transformers
        mappings = [getattr(transformers, name)._model_mapping for name in auto_classes.AUTO_CLASSES]
        every = list(dict.fromkeys(CONFIG_MAPPING[kind] for kind in CONFIG_MAPPING))
        every += [type(config.__name__, (), {{}}) for config in every]
        for mapping in mappings:
            listed = type(mapping).keys(mapping)
            assert list(mapping) == list(mapping.keys()) == listed and len(mapping.keys()) == len(listed) > 2
            assert [config for config in every if config in mapping.keys()] == [config for config in every if config in listed]
        new = type("NewConfig", (transformers.PretrainedConfig,), {{"model_type": "new"}})
        assert new not in mappings[0].keys()
        mappings[0].register(new, transformers.LlavaForConditionalGeneration)
        assert new in mappings[0].keys() and "keys" not in vars(AutoModelForCausalLM._model_mapping)
        print("ok")
    """
    result = python(code)
    imported, ok = result.stdout.split()[-2:]
    assert ok == "ok", result.stderr
    assert int(imported) < 30, "LLaMA-Factory's own imports bring in a few"
