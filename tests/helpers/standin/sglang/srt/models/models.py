class DeepseekV2ForCausalLM: ...


class DeepseekV3ForCausalLM: ...


class Qwen3MoeForCausalLM: ...


EntryClass = [DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Qwen3MoeForCausalLM]
