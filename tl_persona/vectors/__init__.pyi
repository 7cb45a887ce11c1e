from .best import BestLayer as BestLayer
from .table import LayerTable as LayerTable
from .vector import SteeringVector as SteeringVector
from .vector_set import SteeringVectorSet as SteeringVectorSet
