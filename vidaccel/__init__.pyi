from vidaccel.api import benchmark as benchmark
from vidaccel.api import collect_features as collect_features
from vidaccel.api import distill as distill
from vidaccel.api import export_model as export_model
from vidaccel.api import generate as generate
from vidaccel.api import plan as plan
from vidaccel.api import train_predictor as train_predictor
from vidaccel.cache.attach import attach as attach
from vidaccel.cache.schedule import Schedule as Schedule
from vidaccel.errors import UserError as UserError
from vidaccel.forecasters.learned import Predictor as Predictor
from vidaccel.forecasters.learned import load_predictor as load_predictor
from vidaccel.models.loading import load_pipeline as load_pipeline
from vidaccel.models.loading import load_student as load_student
from vidaccel.models.saving import save_model as save_model

__version__: str
