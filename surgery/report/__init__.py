"""Reports: one page of facts, tables and figures about an index, several indexes or a pruned folder.

`document` defines what a report consists of. `channels`, `spikes`, `revisions`, `pruned`, `comparison` and
`generation` make its sections from indexes and from the surgeon.json of a pruned folder; `build` puts them
together. `page` writes HTML, `figures` writes PNG and SVG; both draw the values that are also saved as JSON.
"""
