#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_identity(nanobind::module_& module);

}  // namespace dscheck
