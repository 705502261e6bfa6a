"""The part of an adapter that PEFT applies: which modules it is for, putting it in, taking it out."""
