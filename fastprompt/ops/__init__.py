from .prompt_concat.api import prompt_concat
from .prefix_attention.api import prefix_attention
