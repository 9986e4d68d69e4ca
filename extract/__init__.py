"""Stage one: text and a language model become activation stores."""
