"""A vision-language model as a judge: asked here or over HTTP."""
