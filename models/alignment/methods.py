"""Which file trains by which loss.

A new loss is a file beside this one, a line in each table here, and a name in the recipe.
"""

from models.alignment import dpo, kto
from models.recipe import Method

TRAIN = {Method.dpo: dpo.train, Method.kto: kto.train}
CURVE = {Method.dpo: dpo.CURVE, Method.kto: kto.CURVE}
