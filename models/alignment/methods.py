"""Which file trains by which loss. A new loss is a file beside this one, a line here, and a name in the recipe."""

from models.alignment import dpo, kto
from models.recipe import Method

TRAIN = {Method.dpo: dpo.train, Method.kto: kto.train}
