#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

// Nodes, roots and the look at them. What is recorded is not kept alive, except types, texts and numbers.
void bind_identity(nanobind::module_& module);

}  // namespace dscheck
