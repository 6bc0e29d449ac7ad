"""Models in Flax Linen: decoder, encoder, vision tower, and the layers and attention implementations they share.

Why Linen: a Linen module is a pure function of a plain tree of parameters, so that sharding, checkpoints, conversion
and optimizers here are functions of trees, and `nn.scan`, `nn.remat` and logical axis names fit on top as they do in
t5x and MaxText. NNX keeps parameters in mutable modules, which every compiled step here would have to split off and
merge again, without a model that needs it.
"""
