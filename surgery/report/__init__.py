"""One page about a model or a cut: a document of facts, tables and figures, and the ways to write it down.

`document` says what a page is made of; `channels`, `spikes`, `revisions` and `cut` fill it from indexes and from the
surgeon.json of a pruned folder; `page` writes it as HTML and `figures` as PNG and SVG. All of them draw from the same
values, which are also saved as JSON.
"""
