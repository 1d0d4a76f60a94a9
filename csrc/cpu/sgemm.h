// The product of fp32 matrices that PyTorch itself uses. On its way there through Python and the dispatcher a large
// product spends as long as a small one takes: code and data of all the steps come from memory.
#pragma once

#include "../tensor_view.h"

namespace mmfast {

// Whether PyTorch's library exports one (MKL's). It takes as many threads as torch.set_num_threads says.
bool has_sgemm();

// out [rows, columns] += x w for x [rows, depth] and w [depth, columns], or wᵀ for w [columns, depth] if `transposed`; all
// packed, none empty.
void sgemm_add(const TensorView& x, const TensorView& w, bool transposed, const TensorView& out);

}  // namespace mmfast
