#include "prompt_lstm_kernels.h"
