"""The only code that knows LLaMA-Factory's insides: one file per hooked module, each with what it expects of it.

It translates: a configuration into our arguments, LLaMA-Factory's call into ours, our report into its log.
"""
